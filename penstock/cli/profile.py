"""`penstock profile`: how fast the disk, the links and the arithmetic of this machine are, and how to read the disk."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import penstock
from penstock.cli.output import ProgressLine, check_output
from penstock.errors import ConfigError, OutputError, PenstockError, TargetError
from penstock.io.interrupts import held_back
from penstock.offload.tiers import format_size, parse_size

if TYPE_CHECKING:
    from penstock.io.facts import HostFacts
    from penstock.io.profiler import Disk, DiskProfile, ProfileOptions
    from penstock.io.scratch import Target
    from penstock.io.sweep import Deadline
    from penstock.offload.hardware import HardwareProfile, Links

__all__ = ["add_to", "measure_again"]

logger = logging.getLogger("penstock.cli")

QUICK, NORMAL, THOROUGH = 15.0, 90.0, 300.0
_START_AND_END_SHARE, _START_AND_END_SECONDS = 0.2, 3.0
"""What the interpreter, the last requests, the report and the exit take of the time that was promised, at most."""

_MIN_SECONDS = 5.0
_QUICK_BLOCKS, _QUICK_DEPTHS = "256KiB,1MiB,4MiB", "1,4,16,64"
_BLOCKS, _DEPTHS = "128KiB,256KiB,512KiB,1MiB,2MiB,4MiB,8MiB,16MiB", "1,2,4,8,16,32,64"
_QUICK_SCRATCH_BYTES = 1 << 30
_UNASKED_SCRATCH_BYTES = 64 << 20
"""What is written, at most, when a machine is measured that nobody asked to have measured."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "profile",
        help="measure the disk, the links and the arithmetic of this machine",
        description="Measure how fast this machine reads its disk, copies and computes, and recommend how to read. A "
        "model directory's largest shard, or a file, is only read; in any other directory one scratch file without a "
        "name is written, which never stays.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="model directory, file, or directory on the disk (default: .)"
    )
    pace = parser.add_argument_group("time").add_mutually_exclusive_group()
    pace.add_argument("--quick", action="store_true", help=f"at most {QUICK:.0f} s, for a first look")
    pace.add_argument("--thorough", action="store_true", help=f"{THOROUGH:.0f} s, for a noisy disk")
    pace.add_argument("--time", type=float, metavar="SECONDS", help=f"at most so long (default: {NORMAL:.0f})")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--block", metavar="LIST", help=f"block sizes (default: {_BLOCKS})")
    sweep.add_argument("--depth", metavar="LIST", help=f"requests in flight (default: {_DEPTHS})")
    sweep.add_argument(
        "--size", metavar="SIZE", help="of the scratch file (default: 4GiB, at most 10 %% of what is free)"
    )
    sweep.add_argument("--max-write", default="4GiB", metavar="SIZE", help="never write more (default: %(default)s)")
    results = parser.add_argument_group("results")
    results.add_argument("--json", metavar="FILE", help="write the profile there too; - is stdout, and nothing else is")
    results.add_argument("--html", metavar="FILE", help="write a self-contained report with plots")
    results.add_argument("--compare", metavar="OLD.json", help="show what changed since that profile")
    results.add_argument("--expect-gbps", type=float, metavar="GBPS", help="exit with 1 if the disk is slower")
    results.add_argument("--verify-fio", action="store_true", help="compare with fio; two minutes more")
    results.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    began = time.monotonic()
    with held_back():  # some libraries swallow an exit that comes while they are imported
        from penstock.cli.profile_report import explain_changes, explain_profile  # noqa: PLC0415 - needs numpy, below
        from penstock.io.fio import check_installed  # noqa: PLC0415
        from penstock.io.profiler import open_disk  # noqa: F401, PLC0415 - used later
        from penstock.io.scratch import choose_target  # noqa: PLC0415
        from penstock.offload.hardware import HardwareProfile, compare, profile_path  # noqa: PLC0415

    seconds = _seconds(options)
    wanted = _options(options, seconds)
    for path in (options.html, options.json if options.json != "-" else None):
        check_output(path)
    old = HardwareProfile.load(options.compare) if options.compare else None
    targets = [choose_target(path) for path in options.paths or ["."]]
    if options.verify_fio:
        check_installed()
    if options.dry_run:
        return _dry_run(targets, wanted, seconds)
    profile = _measure(targets, wanted, began, seconds, verify_fio=options.verify_fio)
    kept = profile_path(os.environ.get("XDG_CACHE_HOME"))
    profile.store(kept)
    human = sys.stderr if options.json == "-" else sys.stdout
    colours = human.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print(explain_profile(profile, colours=colours, kept=str(kept)), file=human)
    if old:
        print(explain_changes(compare(old, profile)), file=human)
    _write_results(options, profile)
    return _judge(options.expect_gbps, profile)


def measure_again(model: str | os.PathLike[str] | None, kept: Path) -> HardwareProfile:
    """Measure this machine as `--quick` does, in place of a profile in the file `kept` that is of no use, and keep it.

    What is read is the model's largest shard; a small scratch file here where there is none, or none large enough.
    Raises TargetError and NoSpaceError.
    """
    from penstock.io.scratch import Target, choose_target  # noqa: PLC0415 - numpy

    began = time.monotonic()
    wanted = _options(argparse.Namespace(block=None, depth=None, size=None, max_write="4GiB"), QUICK)
    try:
        target = choose_target(model or ".")
    except TargetError:
        target = Target("directory", Path(), Path(), None)
    if target.file is None:
        wanted = replace(wanted, size=_UNASKED_SCRATCH_BYTES)
    profile = _measure([target], wanted, began, QUICK, verify_fio=False)
    try:
        profile.store(kept)
    except OutputError as error:
        logger.warning("what was measured is not kept: %s", error)
    return profile


def _seconds(options: argparse.Namespace) -> float:
    seconds = float(options.time or (QUICK if options.quick else THOROUGH if options.thorough else NORMAL))
    if not seconds >= _MIN_SECONDS:
        raise ConfigError("--time is too short to measure anything", wanted=f"at least {_MIN_SECONDS:g}", got=seconds)
    if options.expect_gbps is not None and not options.expect_gbps > 0:
        raise ConfigError("--expect-gbps is not a rate", wanted="more than 0", got=options.expect_gbps)
    return seconds


def _options(options: argparse.Namespace, seconds: float) -> ProfileOptions:
    from penstock.io.profiler import ProfileOptions  # noqa: PLC0415 - numpy

    quick = seconds < 30
    blocks = _list("--block", options.block or (_QUICK_BLOCKS if quick else _BLOCKS))
    depths = _list("--depth", options.depth or (_QUICK_DEPTHS if quick else _DEPTHS))
    if any(block % 4096 or not 4096 <= block <= 64 << 20 for block in blocks):
        raise ConfigError("--block is out of range", wanted="multiples of 4KiB up to 64MiB", got=options.block)
    if any(not 1 <= depth <= 1024 for depth in depths):
        raise ConfigError("--depth is out of range", wanted="1 to 1024", got=options.depth)
    max_write = parse_size(options.max_write)
    return ProfileOptions(
        blocks=blocks,
        depths=depths,
        size=parse_size(options.size) if options.size else None,
        max_write=min(max_write, _QUICK_SCRATCH_BYTES) if quick and not options.size else max_write,
        scratch_seconds=0.15 * seconds,
    )


def _list(option: str, text: str) -> tuple[int, ...]:
    values = sorted({parse_size(part) for part in text.split(",") if part.strip()})
    if not values:
        raise ConfigError(f"{option} is empty", wanted="values separated by commas", got=repr(text))
    return tuple(values)


def _dry_run(targets: list[Target], wanted: ProfileOptions, seconds: float) -> int:
    from penstock.io.scratch import scratch_nbytes  # noqa: PLC0415 - numpy

    for target in targets:
        if target.file:
            print(f"{target.path}: would read {target.file.path} ({format_size(target.file.nbytes)}), writing nothing")
        else:
            nbytes = scratch_nbytes(target.directory, size=wanted.size, max_write=wanted.max_write)
            print(f"{target.path}: would write up to {format_size(nbytes)} to a file without a name, and read it")
    blocks = ", ".join(map(format_size, wanted.blocks))
    print(f"blocks {blocks}; depths {', '.join(map(str, wanted.depths))}; at most {seconds:.0f} s")
    return 0


def _measure(
    targets: list[Target], wanted: ProfileOptions, began: float, seconds: float, *, verify_fio: bool
) -> HardwareProfile:
    from penstock.io.advice import Warn, host_warnings  # noqa: PLC0415 - numpy, here and below
    from penstock.io.facts import host_facts  # noqa: PLC0415
    from penstock.io.profiler import open_disk  # noqa: PLC0415
    from penstock.io.sweep import Deadline  # noqa: PLC0415
    from penstock.offload.hardware import SCHEMA, UNKNOWN_LINKS, HardwareProfile  # noqa: PLC0415

    started = datetime.now(UTC).isoformat(timespec="seconds")
    reserve = min(_START_AND_END_SHARE * seconds, _START_AND_END_SECONDS)
    deadline = Deadline(seconds - reserve - (time.monotonic() - began))
    progress = ProgressLine()

    def show(step: str) -> None:
        progress.show(f"{time.monotonic() - began:.0f} of at most {seconds:.0f} s: {step}")

    torch = _TorchImport()
    host = host_facts()
    links = UNKNOWN_LINKS
    disks: list[DiskProfile] = []
    for number, target in enumerate(targets):
        _announce(target, wanted)
        share = deadline.part(deadline.left() / (len(targets) - number))
        with open_disk(target, wanted, deadline=share, on_step=show) as disk:
            torch.wait(0.25 * share.left())
            disk.deadline = share.part(share.left() - (torch.reserve(seconds) if number == 0 else 0.0))
            profile = disk.profile(wanted, seed=os.getpid(), on_step=show)
            if number == 0:
                links = _links(disk, profile, share, torch, show)
            if verify_fio:
                profile = _verify(disk, profile, host, show)
        disks.append(profile)
    progress.clear()
    complete = links.complete and all(disk.sweep.complete for disk in disks)
    warnings = list(host_warnings(host))
    if not complete:
        fix = "measure without --quick, with --thorough or a longer --time"
        warnings.append(Warn("incomplete", "the time was up before everything was measured", fix))
    warnings += _path_warnings(disks, links)
    elapsed = time.monotonic() - began
    return HardwareProfile(
        SCHEMA, penstock.__version__, started, elapsed, complete, host, tuple(disks), links, tuple(warnings)
    )


def _announce(target: Target, wanted: ProfileOptions) -> None:
    """Say how much will be written before it is."""
    from penstock.io.scratch import scratch_nbytes  # noqa: PLC0415 - numpy

    if target.file is None:
        nbytes = scratch_nbytes(target.directory, size=wanted.size, max_write=wanted.max_write)
        print(
            f"penstock: writing up to {format_size(nbytes)} to a file without a name in {target.directory}, which is "
            "gone when this ends; a model directory or a file would only be read",
            file=sys.stderr,
        )


class _TorchImport:
    """Imports torch and starts CUDA, which takes seconds, beside the disk's measurements; waits no longer than told."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._import, name="penstock-torch", daemon=True)
        self._thread.start()

    def _import(self) -> None:
        # What fails here fails again, with its message, where it is used.
        with contextlib.suppress(Exception):
            torch = importlib.import_module("torch")
            if torch.cuda.is_available():
                torch.zeros(1, device="cuda")
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; return whether it is there."""
        return self._done.wait(seconds)

    def reserve(self, seconds: float) -> float:
        """Return the seconds to keep for the links: few without a GPU."""
        if not self.wait(0):
            return 0.2 * seconds
        import torch  # noqa: PLC0415 - it has just been imported

        return min(20.0, 0.25 * seconds) if torch.cuda.is_available() else 2.2


def _links(disk: Disk, profile: DiskProfile, deadline: Deadline, torch: _TorchImport, show: Any) -> Links:
    from penstock.offload.hardware import UNKNOWN_LINKS  # noqa: PLC0415

    if not torch.wait(deadline.left()):
        return UNKNOWN_LINKS
    from penstock.offload.links import measure_links  # noqa: PLC0415

    choice = profile.sweep.choice
    return measure_links(deadline=deadline, disk=(disk.file, choice) if choice else None, on_step=show)


def _verify(disk: Disk, profile: DiskProfile, host: HostFacts, show: Any) -> DiskProfile:
    """Add fio's verdict, or a warning that says why there is none: what was measured is not to be lost."""
    from penstock.io.advice import Warn  # noqa: PLC0415 - numpy

    try:
        if profile.engine != "libaio" or profile.sweep.choice is None:
            raise ConfigError("fio is compared with Linux AIO only", got=profile.engine_reason)
        return replace(profile, fio=disk.verify(profile.sweep, host, show))
    except PenstockError as error:
        return replace(profile, warnings=(*profile.warnings, Warn("fio_failed", error.what, str(error.fix or error))))


def _path_warnings(disks: list[DiskProfile], links: Links) -> Iterator[Any]:
    """Yield what only disks and GPU together show."""
    from penstock.io.advice import Warn, path_warnings  # noqa: PLC0415

    for disk in disks:
        choice = disk.sweep.choice
        nodes = {device.numa_node for device in disk.target.devices if device.numa_node is not None}
        yield from path_warnings(
            disk.target.path,
            rate=choice.bytes_per_second if choice else None,
            nodes=nodes,
            host_to_device=links.host_to_device,
            device_node=links.device_numa_node,
        )
    if links.device != "cpu" and links.host_to_device is None and links.pageable_to_device is not None:
        yield Warn(
            "not_pinned", "host memory could not be pinned", "raise the container's memory limit and `ulimit -l`"
        )
    pcie = links.device_pcie
    if pcie and pcie.width < pcie.max_width:
        yield Warn("gpu_pcie_width", f"the GPU has {pcie.width} of {pcie.max_width} PCIe lanes", "use another slot")


def _write_results(options: argparse.Namespace, profile: HardwareProfile) -> None:
    from penstock.io.atomic import write_whole  # noqa: PLC0415

    if options.json == "-":
        sys.stdout.write(profile.to_json())
        sys.stdout.flush()
    elif options.json:
        write_whole(Path(options.json), profile.to_json())
    if options.html:
        from penstock.cli.profile_html import html_report  # noqa: PLC0415 - only where it is asked for

        write_whole(Path(options.html), html_report(profile))


def _judge(expected: float | None, profile: HardwareProfile) -> int:
    """Return the exit status: 1 for a disk slower than expected, and for a comparison with fio that did not happen."""
    status = 0
    for disk in profile.disks:
        choice = disk.sweep.choice
        if expected is not None and (choice is None or choice.bytes_per_second < expected * 1e9):
            got = f"{choice.bytes_per_second / 1e9:.2f}" if choice else "nothing measured"
            print(f"penstock: {disk.target.path}: wanted at least {expected:g} GB/s, got {got}", file=sys.stderr)
            status = 1
        if any(warning.code == "fio_failed" for warning in disk.warnings):
            status = 1
    return status
