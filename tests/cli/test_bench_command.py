import json
import os
import subprocess
import sys

import pytest

from penstock.cli.main import main
from penstock.offload.peaks import DiskPeak, Peaks


def test_a_shape_on_any_device(capsys, tmp_path, device):
    trace = tmp_path / "trace.json"
    arguments = ["bench", "--shape", "tiny", "--distinct-layers", "1", "--scratch", str(tmp_path), "--device", device]
    arguments += ["--prompt-len", "4", "--gen-len", "4", "--batch-size", "2", "--host-memory", "150MB"]
    arguments += ["--device-memory", "200MB", "--device-layers", "2", "--trace", str(trace)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["settings"]["shape"] == "tiny"
    assert record["parameters"] == 192_971_776
    assert record["layers"]["device"] == 2
    assert record["layers"]["host"] == 6
    assert record["layers"]["nvme"] == 8
    assert record["decode"]["passes"] == 3
    nbytes = record["plan"]["nvme_nbytes"]
    assert record["decode_steady"]["links"]["nvme_to_host"]["bytes"] >= 2 * nbytes * 0.9
    for phase in (record["prefill"], record["decode"], record["decode_steady"]):
        assert sum(phase["time"].values()) == pytest.approx(1)
        assert phase["links"]["host_to_device"]["bytes"] == phase["passes"] * (nbytes + record["plan"]["host_nbytes"])
        for link in phase["links"].values():
            assert link["share_of_peak"] > 0
        assert phase["share_of_matmul"] > 0
    assert "of the peak" in out
    assert record["memory"]["peak_process_bytes"] > 0
    assert os.listdir(tmp_path) == ["trace.json"]
    assert {event["name"] for event in json.loads(trace.read_text())["traceEvents"]} >= {"layer 0", "thread_name"}


@pytest.fixture
def unknown_peaks(monkeypatch):
    from penstock.engine import bench

    monkeypatch.setattr(bench, "measure_peaks", lambda file, **_: Peaks("a device", None, None, DiskPeak(file), {}))


def test_a_model_with_its_own_weights(capsys, unknown_peaks, tiny_llama, device):
    arguments = ["bench", str(tiny_llama), "--device", device, "--prompt-len", "4", "--gen-len", "2", "--json"]
    assert main([*arguments, "--batch-size", "2", "--device-memory", "4MiB", "--host-memory", "0"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["dtype"] == "float32"
    assert record["decode_steady"] is None
    assert record["decode"]["links"]["host_to_device"]["share_of_peak"] is None
    assert record["decode"]["share_of_matmul"] is None


def test_a_terminated_bench_leaves_nothing(tmp_path):
    scratch, temporary = tmp_path / "scratch", tmp_path / "temporary"
    scratch.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "penstock", "bench", "-v", "--shape", "tiny", "--scratch", scratch]
    command += ["--layers", "40", "--gen-len", "1000", "--trace", scratch / "trace.json"]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        said = running.stderr.readline()  # which device it is, when the dummy weights are there
        assert list(temporary.glob("penstock-*"))
        running.terminate()
        said += running.stderr.read()
        assert running.wait(90) == 128 + 15, said
    assert list(temporary.glob("penstock-*")) == []
    assert os.listdir(scratch) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model or a shape"),
        (["--shape", "tiny", "MODEL"], "a model or a shape"),
        (["MODEL", "--layers", "3"], "only dummy weights"),
        (["MODEL", "--distinct-layers", "3"], "only dummy weights"),
        (["--shape", "tiny", "--batch-size", "0"], "batch_size"),
        (["--shape", "tiny", "--trace", "/none/trace.json"], "cannot be written"),
        (["--shape", "tiny", "--scratch", "/dev/shm"], "lies in memory"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, arguments, message):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_dummy_weights_of_a_models_config(capsys, unknown_peaks, tiny_llama, tmp_path, device):
    arguments = ["bench", str(tiny_llama), "--dummy", "--layers", "9", "--scratch", str(tmp_path), "--device", device]
    arguments += ["--prompt-len", "4", "--gen-len", "2", "--batch-size", "2", "--device-memory", "4MiB", "--json"]
    assert main([*arguments, "--host-memory", "0", "--device-layers", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {"device": 0, "host": 0, "nvme": 9}
