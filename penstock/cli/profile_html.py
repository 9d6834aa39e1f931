"""A hardware profile as one HTML file with inline plots: no script, no font and no picture from anywhere else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from penstock.cli.profile_report import (
    config_line,
    disk_rows,
    gbps,
    heat_rows,
    host_line,
    link_rows,
    short_size,
    target_line,
)  # fmt: skip
from penstock.io.profiler import DiskProfile
from penstock.offload.hardware import HardwareProfile, Links

__all__ = ["html_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } td { padding: .15rem .9rem .15rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; opacity: .65; }
code { background: #8882; padding: .2rem .4rem; border-radius: .2rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.warn { border-left: 4px solid #d80; padding: .1rem .8rem; margin: .6rem 0; }
.small { opacity: .65; font-size: .85rem; }
"""
_LINES = ("#1b6ca8", "#d1495b", "#3a7d44", "#8e5ea2", "#c98b00", "#009e9e", "#7a5230", "#6b7280")


def html_report(profile: HardwareProfile) -> str:
    """Return the page."""
    state = "complete" if profile.complete else "<b>incomplete: the time was up</b>"
    body = [
        "<h1>Penstock hardware profile</h1>",
        f"<p>{_text(host_line(profile.host))}<br><span class=small>measured {_text(profile.started)} in "
        f"{profile.elapsed_seconds:.1f} s, {state}; penstock {_text(profile.penstock)}; "
        "GB is 10<sup>9</sup> bytes</span>",
    ]
    for disk in profile.disks:
        body += _disk(disk)
    body += ["<h2>Memory, links and arithmetic</h2>", _table(link_rows(profile.links)), _link_bars(profile.links)]
    warnings = [*profile.warnings, *(warning for disk in profile.disks for warning in disk.warnings)]
    if warnings:
        body.append("<h2>Warnings</h2>")
    for each in warnings:
        body.append(f"<p class=warn><b>{each.code}</b>: {_text(each.text)}<br>Fix: {_text(each.fix)}</p>")
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Penstock hardware profile</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>{content}</body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_text(label)}<td>{_text(text)}" for label, text in rows)
    return f"<table>{cells}</table>"


def _disk(disk: DiskProfile) -> list[str]:
    parts = [f"<h2>{_text(target_line(disk))}</h2>", _table(disk_rows(disk))]
    if disk.sweep.choice:
        parts += [
            f"<p>To copy: <code>{_text(config_line(disk))}</code></p>",
            "<h3>GB/s by block size and queue depth</h3>", _heat_map(disk),
            "<h3>GB/s by bytes in flight</h3>", _curves(disk),
            "<h3>Finalists, in random rounds: every visit, the median and its bounds</h3>", _finalists(disk),
        ]  # fmt: skip
    if disk.fio:
        parts.append(f"<h3>Against {_text(disk.fio.version)}: {disk.fio.verdict}</h3>")
        rows = [
            (
                f"{short_size(each.cell.block_nbytes)} × {each.cell.depth}",
                f"ours ÷ fio's {each.ratio:.3f} [{each.lower:.3f}, {each.upper:.3f}], {each.rounds} rounds",
            )
            for each in disk.fio.cells
        ]
        parts += [_table(rows), f"<p><code>{_text(' '.join(disk.fio.argv))}</code></p>"]
    return parts


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">{"".join(parts)}</svg>'


def _label(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{_text(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _shade(share: float) -> tuple[str, str]:
    """Return the colours of the ground and of the text on it; the lightness carries the value."""
    return f"hsl({225 - 65 * share:.0f} 60% {25 + 45 * share:.0f}%)", "#fff" if share < 0.75 else "#111"


def _heat_map(disk: DiskProfile) -> str:
    depths, rows = heat_rows(disk)
    best = max(rate for _, rates in rows for rate in rates if rate)
    choice = disk.sweep.choice
    wide, high, left, top = 74, 30, 80, 24
    parts = [_label(left + wide * (i + 0.5), 16, str(depth), "middle") for i, depth in enumerate(depths)]
    for row, (block, rates) in enumerate(rows):
        y = top + high * row
        parts.append(_label(left - 8, y + 20, short_size(block), "end"))
        for column, rate in enumerate(rates):
            if rate is None:
                continue
            ground, ink = _shade(rate / best)
            chosen = choice and (block, depths[column]) == (choice.cell.block_nbytes, choice.cell.depth)
            edge = "stroke:#e33;stroke-width:3" if chosen else ""
            x = left + wide * column
            parts.append(
                f'<rect x="{x + 2}" y="{y + 2}" width="{wide - 4}" height="{high - 4}" style="fill:{ground};{edge}"/>'
            )
            parts.append(_label(x + wide / 2, y + 20, f"{rate / 1e9:.2f}", "middle", f"fill:{ink}"))
    legend = "<p class=small>columns: requests in flight; rows: block size; red: recommended</p>"
    return _svg(left + wide * len(depths), top + high * len(rows), parts) + legend


def _curves(disk: DiskProfile) -> str:
    depths, rows = heat_rows(disk)
    width, height, left, bottom, right = 760, 320, 46, 34, 90
    points = {
        block: [(block * depth, rate) for depth, rate in zip(depths, rates, strict=True) if rate]
        for block, rates in rows
    }
    flat = [point for series in points.values() for point in series]
    low, high = (math.log2(bound(x for x, _ in flat)) for bound in (min, max))
    top = 1.08 * max(rate for _, rate in flat)

    def place(nbytes: float, rate: float) -> tuple[float, float]:
        across = (math.log2(nbytes) - low) / max(1e-9, high - low)
        return left + (width - left - right) * across, (height - bottom) * (1 - rate / top) + 6

    parts = _rate_axis(top, left, width - right, lambda rate: place(2**low, rate)[1])
    step = max(1, round((high - low) / 8))
    for power in range(math.ceil(low), math.floor(high) + 1, step):
        parts.append(_label(place(2**power, 0)[0], height - 8, short_size(2**power), "middle"))
    for index, (block, series) in enumerate(points.items()):
        colour = _LINES[index % len(_LINES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in series))
        parts.append(f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}"/>' for x, y in (place(*p) for p in series)
        ]
        parts.append(_label(width - right + 12, 20 + 18 * index, short_size(block), "start", f"fill:{colour}"))
    choice = disk.sweep.choice
    if choice:
        x, y = place(min(max(choice.cell.in_flight_nbytes, 2**low), 2**high), choice.bytes_per_second)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" style="fill:none;stroke:#e33;stroke-width:3"/>')
    return _svg(width, height, parts)


def _rate_axis(top: float, left: float, right: float, y_of: object) -> list[str]:
    assert callable(y_of)
    step = _round_step(top / 5)
    parts = []
    for number in range(int(top / step) + 1):
        y = y_of(step * number)
        parts.append(_line(left, y, right, y, "stroke:#8884"))
        parts.append(_label(left - 6, y + 4, f"{step * number / 1e9:g}", "end"))
    return parts


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5 × a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


def _finalists(disk: DiskProfile) -> str:
    finals = [each for each in disk.sweep.cells if len(each.rates) > 1]
    finals.sort(key=lambda each: each.cell.in_flight_nbytes)
    if not finals:
        return "<p class=small>no time for any</p>"
    left, width, high = 210, 760, 22
    top = 1.05 * max(max(each.rates) for each in finals)

    def x_of(rate: float) -> float:
        return left + (width - left - 20) * rate / top

    parts = []
    for row, each in enumerate(finals):
        y = 14 + high * row
        cell = each.cell
        chosen = disk.sweep.choice is not None and cell == disk.sweep.choice.cell
        colour = "#e33" if chosen else "#1b6ca8"
        name = f"{short_size(cell.block_nbytes)} × {cell.depth}, {'layers' if cell.pattern == 'layer' else cell.engine}"
        parts.append(_label(left - 10, y + 4, name, "end", "font-weight:bold" if chosen else ""))
        parts.append(_line(x_of(each.lower), y, x_of(each.upper), y, f"stroke:{colour};stroke-width:3;opacity:.5"))
        parts += [
            f'<circle cx="{x_of(rate):.1f}" cy="{y}" r="2.5" style="fill:currentColor;opacity:.45"/>'
            for rate in each.rates
        ]
        parts.append(f'<circle cx="{x_of(each.median):.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
    bottom = 14 + high * len(finals)
    step = _round_step(top / 6)
    for number in range(int(top / step) + 1):
        parts.append(_line(x_of(step * number), 4, x_of(step * number), bottom - 6, "stroke:#8884"))
        parts.append(_label(x_of(step * number), bottom + 10, f"{step * number / 1e9:g}", "middle"))
    return _svg(width, bottom + 18, parts)


def _link_bars(links: Links) -> str:
    named: Sequence[tuple[str, float | None]] = (
        ("host memory, read", links.host_read), ("host memory, copy", links.host_copy),
        ("host → GPU", links.host_to_device), ("GPU → host", links.device_to_host),
        ("both at once", links.both_directions), ("pageable → GPU", links.pageable_to_device),
        ("disk → GPU", links.read_and_copy),
    )  # fmt: skip
    known = [(name, rate) for name, rate in named if rate]
    if not known:
        return ""
    top = max(rate for _, rate in known)
    parts = []
    for row, (name, rate) in enumerate(known):
        y = 24 * row
        parts.append(_label(150, y + 16, name, "end"))
        parts.append(f'<rect x="160" y="{y + 3}" width="{480 * rate / top:.1f}" height="18" style="fill:#1b6ca8"/>')
        parts.append(_label(168 + 480 * rate / top, y + 16, gbps(rate)))
    return _svg(760, 24 * len(known) + 4, parts)
