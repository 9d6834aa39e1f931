"""A hardware profile for people: a table, a heat map, and one line to copy. GB is 10^9 bytes; GiB is for sizes only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from penstock.io.advice import Warn
from penstock.io.blockdev import BlockDevice
from penstock.io.cells import Cell
from penstock.io.facts import HostFacts
from penstock.io.fio import FioVerdict
from penstock.io.plateau import Choice
from penstock.io.profiler import DiskProfile
from penstock.offload.hardware import Change, HardwareProfile, Links, settings_of
from penstock.offload.tiers import format_size

__all__ = [
    "config_line", "disk_rows", "explain_changes", "explain_profile", "gbps", "heat_rows", "host_line", "link_rows",
    "short_size", "target_line",
]  # fmt: skip

Row = tuple[str, str]
"""A label and what belongs to it."""

_SHADES = " .:-=+*#%@"
_PALETTE = (17, 18, 19, 25, 31, 37, 36, 35, 34, 40, 76, 112)
"""From dark blue to light green in the 256 colours of terminals."""
_UNKNOWN = "unknown"


def explain_profile(profile: HardwareProfile, *, colours: bool, kept: str | None = None) -> str:
    """Return the whole report."""
    lines: list[str] = [f"machine        {host_line(profile.host)}"]
    for disk in profile.disks:
        lines += ["", target_line(disk), *_rows(_place_rows(disk)), ""]
        lines += [*_heat_map(disk, colours=colours), "", *_rows(disk_rows(disk))]
        if disk.fio:
            lines += _explain_fio(disk.fio)
    lines += ["", *_rows(link_rows(profile.links))]
    warnings = [*profile.warnings, *(warning for disk in profile.disks for warning in disk.warnings)]
    lines += _explain_warnings(warnings)
    lines.append("")
    lines += [f"config         {config_line(disk)}" for disk in profile.disks if disk.sweep.choice]
    state = "complete" if profile.complete else "INCOMPLETE: the time was up"
    lines.append(f"took           {profile.elapsed_seconds:.1f} s, {state}" + (f"; kept in {kept}" if kept else ""))
    return "\n".join(lines)


def _rows(rows: Iterable[Row]) -> list[str]:
    return [f"{label:<14} {text}" for label, text in rows]


def host_line(host: HostFacts) -> str:
    """Describe the machine."""
    limit = f", a control group allows {format_size(host.cgroup_limit_nbytes)}" if host.cgroup_limit_nbytes else ""
    return (
        f"Linux {host.kernel}, {host.cpus} CPUs, {format_size(host.memory_nbytes)} of memory{limit}, "
        f"huge pages {host.transparent_huge_pages or _UNKNOWN}"
    )


def target_line(disk: DiskProfile) -> str:
    """Say what was read."""
    size = format_size(disk.file.nbytes)
    how = f"a scratch file of {size}, removed" if disk.file.created else f"{size} read in place, nothing written"
    return f"{disk.target.path}: {how}"


def _place_rows(disk: DiskProfile) -> Iterator[Row]:
    target = disk.target
    direct = "O_DIRECT works" if target.direct.works else f"read through the page cache: {target.direct.reason}"
    yield (
        "file system",
        f"{target.file_system} ({target.mount_options}), {format_size(target.free_nbytes)} free; {direct}",
    )
    for device in target.devices:
        yield "device", _device(device)
    yield "reader", f"{disk.engine}: {disk.engine_reason}"


def _device(device: BlockDevice) -> str:
    parts = [device.name, device.model or "model unknown"]
    if device.pcie:
        parts.append(f"PCIe {device.pcie.speed:g} GT/s × {device.pcie.width}")
    if device.raid:
        parts.append(f"{device.raid} of {', '.join(device.members) or 'unknown members'}")
    if device.numa_node is not None:
        parts.append(f"NUMA node {device.numa_node}")
    parts.append(f"scheduler {device.scheduler or _UNKNOWN}")
    if device.max_request_nbytes:
        parts.append(f"requests of at most {format_size(device.max_request_nbytes)}")
    return ", ".join(parts)


def gbps(rate: float | None) -> str:
    """Return a rate in GB/s."""
    return _UNKNOWN if rate is None else f"{rate / 1e9:.2f} GB/s"


def short_size(nbytes: int) -> str:
    """Return a power of two without decimals."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size and nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


def _cell(cell: Cell) -> str:
    return f"{short_size(cell.block_nbytes)} × {cell.depth}"


def disk_rows(disk: DiskProfile) -> Iterator[Row]:
    """Yield what the sweep found."""
    sweep = disk.sweep
    choice = sweep.choice
    if choice is None:
        yield "disk read", "nothing measured: the time was up"
        return
    bounds = f"[{choice.lower / 1e9:.2f}, {choice.upper / 1e9:.2f}]"
    yield (
        "recommended",
        (
            f"{gbps(choice.bytes_per_second)} {bounds} with {_cell(choice.cell)} = "
            f"{short_size(choice.cell.in_flight_nbytes)} in flight, {choice.share_of_best:.0%} of the best"
        ),
    )
    yield "because", choice.why
    yield "best", f"{gbps(choice.best_bytes_per_second)} with {_cell(choice.best)}"
    if sweep.knee:
        yield "knee", f"{short_size(sweep.knee.in_flight_nbytes)} in flight ({_cell(sweep.knee)}) reach 90 % of it"
    block = short_size(choice.cell.block_nbytes)
    yield "depth 1", f"{gbps(sweep.depth_one)} with one block of {block} in flight"
    if disk.engine == "libaio":
        yield "whole layers", f"{gbps(sweep.layer)} as the runtime reads"
        yield "threads", f"{gbps(sweep.threads)} without Linux AIO"
    length = f" over {sweep.sustained_seconds:.1f} s" if sweep.sustained_seconds else ""
    yield "sustained", f"{gbps(sweep.sustained)}{length}"
    yield "noise", _noise(choice, len(sweep.repeats))


def _noise(choice: Choice, num_repeats: int) -> str:
    if choice.noise is None:
        return f"unknown: {choice.confidence}"
    return f"±{choice.noise:.1%} between repeats ({num_repeats} pairs); confidence {choice.confidence}"


def heat_rows(disk: DiskProfile) -> tuple[list[int], list[tuple[int, list[float | None]]]]:
    """Return the depths, and for every block its rates in bytes per second, one per depth; None where not visited."""
    rates = {
        (each.cell.block_nbytes, each.cell.depth): each.median
        for each in disk.sweep.cells
        if each.cell.pattern == "window" and each.cell.engine == disk.engine
    }
    depths = sorted({depth for _, depth in rates})
    blocks = sorted({block for block, _ in rates})
    return depths, [(block, [rates.get((block, depth)) for depth in depths]) for block in blocks]


def _heat_map(disk: DiskProfile, *, colours: bool) -> list[str]:
    depths, rows = heat_rows(disk)
    best = max((rate for _, rates in rows for rate in rates if rate), default=0.0)
    if not best:
        return []
    choice = disk.sweep.choice
    lines = ["GB/s by block and depth (R recommended, B best)", " " * 14 + "".join(f"{depth:>8}" for depth in depths)]
    for block, rates in rows:
        cells = []
        for depth, rate in zip(depths, rates, strict=True):
            mark = " "
            if choice:
                place = (block, depth)
                mark = "B" if place == (choice.best.block_nbytes, choice.best.depth) else mark
                mark = "R" if place == (choice.cell.block_nbytes, choice.cell.depth) else mark
            cells.append(_shaded(rate, best, mark, colours=colours))
        lines.append(f"{short_size(block):>13} " + "".join(cells))
    return lines


def _shaded(rate: float | None, best: float, mark: str, *, colours: bool) -> str:
    if rate is None:
        return " " * 8
    share = min(1.0, rate / best)
    if colours:
        colour = _PALETTE[min(len(_PALETTE) - 1, int(share * len(_PALETTE)))]
        return f"\x1b[48;5;{colour}m\x1b[38;5;{231 if share < 0.75 else 16}m {rate / 1e9:>5.2f}{mark} \x1b[0m"
    shade = _SHADES[min(len(_SHADES) - 1, int(share * len(_SHADES)))]
    return f" {shade}{rate / 1e9:>5.2f}{mark}"


def link_rows(links: Links) -> Iterator[Row]:
    """Yield the links that are not the disk's."""
    yield "host memory", f"read {gbps(links.host_read)}, copy {gbps(links.host_copy)}"
    if links.device == "cpu":
        yield "GPU", "none, so its links are unknown"
    else:
        yield "GPU", links.device
        yield "host → GPU", f"{gbps(links.host_to_device)} pinned, {gbps(links.pageable_to_device)} pageable"
        yield "GPU → host", f"{gbps(links.device_to_host)}; both at once {gbps(links.both_directions)}"
        yield "disk → GPU", f"{gbps(links.read_and_copy)} read and copied"
        yield "GPU memory", f"{gbps(links.device_memory)} read and written"
        pin = links.pin_seconds_per_gib
        yield "pinning", _UNKNOWN if pin is None else f"{pin:.3f} s/GiB"
    products = ", ".join(f"{dtype} {flops / 1e12:.3g} TFLOP/s" for dtype, flops in links.matmul.items())
    yield "matrix product", f"{products or _UNKNOWN} on {'the CPU' if links.device == 'cpu' else 'the GPU'}"


def _explain_fio(verdict: FioVerdict) -> list[str]:
    lines = ["", f"{verdict.version}, {verdict.pages} pages on both sides: {verdict.verdict}"]
    lines += [
        f"  {_cell(each.cell):<14} ours ÷ fio's {each.ratio:.3f} [{each.lower:.3f}, {each.upper:.3f}] over "
        f"{each.rounds} rounds ({gbps(each.ours)}, {gbps(each.fio)}; fio against itself ±{each.fio_to_itself - 1:.1%})"
        for each in verdict.cells
    ]
    return [*lines, "  " + " ".join(verdict.argv)]


def _explain_warnings(warnings: Iterable[Warn]) -> list[str]:
    return [line for each in warnings for line in ("", f"warning {each.code}: {each.text}", f"  fix: {each.fix}")]


def config_line(disk: DiskProfile) -> str:
    """Return the settings as options of the commands that run a model."""
    assert disk.sweep.choice is not None
    settings = settings_of(disk.sweep.choice)
    engine = disk.sweep.choice.cell.engine
    return f"--io-backend {engine} --io-block {settings.block_nbytes} --io-in-flight {settings.in_flight_nbytes}"


def explain_changes(changes: Iterable[Change]) -> str:
    """Return what changed between two profiles, one figure a line; what the noise may explain is marked ≈."""
    lines = ["", "compared with the older profile (≈ within the noise)"]
    for change in changes:
        sign = "≈" if not change.significant else "↑" if change.ratio > 1 else "↓"
        old, new = _amount(change.old, change.unit), _amount(change.new, change.unit)
        lines.append(f"  {sign} {change.ratio:5.2f}  {change.name}: {old} → {new}")
    return "\n".join(lines if len(lines) > 2 else [*lines, "  nothing in common"])


def _amount(value: float, unit: str) -> str:
    match unit:
        case "B/s":
            return gbps(value)
        case "B":
            return short_size(int(value))
        case "FLOP/s":
            return f"{value / 1e12:.3g} TFLOP/s"
        case _:
            return f"{value:.3f} {unit}"
