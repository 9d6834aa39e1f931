"""Cells of a benchmark in processes of their own, each with a time limit. For the scripts beside it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_cells"]

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 15


def run_cells(command: list[str], names: list[str], *, limit: float, output: Path) -> dict[str, dict[str, Any]]:
    """Run a process that prints lines of JSON, each with a cell's name under "cell"; the last one of a cell counts.

    Records are written to OUTPUT/<cell>.json, and stderr to OUTPUT/<first cell>.log. Of cells without a record, this
    says so. `limit` is in seconds.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    began = time.perf_counter()
    said = output / f"{names[0]}.log"
    with said.open("w") as log:
        running = subprocess.Popen([*command, *names], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            out, _ = running.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            out = _stop(running)
        finally:
            if running.poll() is None:
                _stop(running)
    lines = [json.loads(line) for line in (out or "").splitlines() if line.startswith("{") and line.endswith("}")]
    records = {record["cell"]: record for record in lines}
    for name, record in records.items():
        (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if missing := [name for name in names if name not in records]:
        last = "".join(said.read_text().strip().splitlines()[-1:])
        seconds = time.perf_counter() - began
        print(f"{missing}: no result after {seconds:.0f} s, status {running.returncode}: {last}", flush=True)
    return records


def _stop(running: subprocess.Popen[str]) -> str:
    """Let a process clean up after itself; kill it if that takes too long."""
    running.terminate()
    try:
        return running.communicate(timeout=GRACE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        running.kill()
        return running.communicate()[0]
