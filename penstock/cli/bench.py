"""`penstock bench`: measure a model, or the shape of one, against what this machine's links and arithmetic can do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli.codec import asked_codec
from penstock.cli.options import add_memory, tiers_of
from penstock.cli.output import ProgressLine, check_output
from penstock.cli.settings import kernel_directory, read_settings, stored_profile
from penstock.errors import ConfigError
from penstock.io.interrupts import held_back
from penstock.offload.tiers import format_size
from penstock.offload.trace import Trace

if TYPE_CHECKING:
    from penstock.engine.bench import BenchReport, Workload
    from penstock.engine.report import Progress
    from penstock.io.checkpoint import Checkpoint
    from penstock.io.settings import ReadSettings
    from penstock.offload.hardware import HardwareProfile
    from penstock.offload.peaks import Peaks

__all__ = ["SHAPES", "add_to", "measure_all"]

SHAPES = Path(__file__).parents[1] / "data" / "shapes"
"""A directory with a config.json for each shape."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    shapes = sorted(path.name for path in SHAPES.iterdir())
    parser = commands.add_parser(
        "bench",
        help="measure prefill and decode of a model or a shape",
        description="Measure prefill and decode against the peaks of disk, bus and arithmetic, measured in the same "
        "process. The last line of stdout is one JSON object.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="directory of a Hugging Face checkpoint")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--shape", choices=shapes, metavar="NAME", help=f"dummy weights of {', '.join(shapes)}")
    weights.add_argument("--dummy", action="store_true", help="dummy weights for MODEL, of which config.json is read")
    weights.add_argument(
        "--distinct-layers",
        type=int,
        metavar="K",
        help="dummy layers of each kind with bytes of their own; the others are aliases (default: 2)",
    )
    weights.add_argument(
        "--scratch", default=".", metavar="DIR", help="where dummy weights lie, without a name (default: %(default)s)"
    )
    weights.add_argument("--layers", type=int, metavar="N", help="dummy layers in all (default: the config's)")
    work = parser.add_argument_group("workload")
    work.add_argument("--prompt-len", type=int, default=512, metavar="N", help="default: %(default)s")
    work.add_argument("--gen-len", type=int, default=32, metavar="N", help="default: %(default)s")
    work.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts")
    memory = add_memory(parser)
    memory.add_argument(
        "--device-layers", type=int, metavar="N", help="layers to keep on the device (default: planned)"
    )
    memory.add_argument(
        "--plan-measured", action="store_true", help="plan with the peaks that are measured, not with a stored profile"
    )
    memory.add_argument("--pass-tokens", type=int, metavar="N", help="tokens that go through all layers in one pass")
    results = parser.add_argument_group("results")
    results.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    results.add_argument("--trace", metavar="FILE", help="write what moved and computed when, for ui.perfetto.dev")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if (options.model is None) == (options.shape is None):
        raise ConfigError("bench needs a model or a shape", fix="Give either a MODEL directory or --shape NAME.")
    if not (options.shape or options.dummy) and (options.layers, options.distinct_layers) != (None, None):
        raise ConfigError("only dummy weights have another number of layers, or aliases", fix="Add --dummy.")
    check_output(options.trace)
    for report in measure_all([options]):
        if not options.json:
            print(report.explain())
        print(json.dumps(report.as_dict()))
    return 0


def measure_all(every: Sequence[argparse.Namespace]) -> Iterator[BenchReport]:
    """Measure runs of the same weights one after another; the weights are opened, and peaks measured, once."""
    first = every[0]
    with held_back():  # some libraries swallow an exit that comes while they are imported
        from penstock.engine import bench  # noqa: PLC0415 - torch; --help must not
        from penstock.engine.budget import find_device  # noqa: PLC0415

    for one in every:  # what is wrong is said before anything takes its time
        for look in (asked_codec, tiers_of, _workload):
            look(one)
    profile, progress = stored_profile(_on_disk(first)), ProgressLine()
    with _checkpoint(first, progress) as checkpoint:
        peaks = bench.measure_peaks(
            max(checkpoint.files, key=lambda file: file.nbytes),
            device=find_device(first.device),
            settings=_settings(first, profile),
            on_step=lambda step: progress.show(f"measuring {step}"),
        )
        for one in every:
            hardware = peaks if one.plan_measured else profile
            report = _measure(one, checkpoint, peaks, progress, hardware=hardware, io=_settings(one, profile))
            progress.clear()
            yield report


def _workload(options: argparse.Namespace) -> Workload:
    from penstock.engine.bench import Workload  # noqa: PLC0415

    return Workload(options.prompt_len, options.gen_len, options.batch_size, options.seed)


def _settings(options: argparse.Namespace, profile: HardwareProfile | None) -> ReadSettings:
    return read_settings(options, _on_disk(options), profile)


def _on_disk(options: argparse.Namespace) -> str:
    """Return what lies on the disk that weights are read from."""
    found: str = options.scratch if options.shape or options.dummy else options.model
    return found


@contextmanager
def _checkpoint(options: argparse.Namespace, progress: ProgressLine) -> Iterator[Checkpoint]:
    """Open the model's own weights, or make dummies that are gone afterwards."""
    from penstock.io.checkpoint import Checkpoint  # noqa: PLC0415

    if options.shape is None and not options.dummy:
        yield Checkpoint.open(options.model)
        return
    from penstock.engine.model.dummy import dummy_checkpoint  # noqa: PLC0415

    with dummy_checkpoint(
        options.model if options.shape is None else SHAPES / options.shape,
        scratch=options.scratch,
        distinct=2 if options.distinct_layers is None else options.distinct_layers,
        num_layers=options.layers,
        dtype=options.dtype,
        on_write=lambda done, total: progress.show(f"writing {format_size(done)} of {format_size(total)}"),
    ) as checkpoint:
        yield checkpoint


def _measure(
    options: argparse.Namespace, checkpoint: Checkpoint, peaks: Peaks, progress: ProgressLine, **settings: Any
) -> BenchReport:
    from penstock.engine import bench  # noqa: PLC0415
    from penstock.engine.llm import LLM  # noqa: PLC0415

    workload = _workload(options)
    trace = Trace() if options.trace else None
    asked = {name: value for name, value in vars(options).items() if name not in ("run", "verbose", "command")}
    asked["peak_memory_since"] = "peaks" if bench.forget_peak_memory() else "process start"
    with LLM(
        checkpoint.directory,
        tiers=tiers_of(options),
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        activation_dtype=options.activation_dtype,
        micro_batch_tokens=options.micro_batch_tokens,
        pass_tokens=options.pass_tokens,
        device_layers=options.device_layers,
        compile=options.compile,
        on_load=lambda done, total: progress.show(f"loading {format_size(done)} of {format_size(total)}"),
        checkpoint=checkpoint,
        trace=trace,
        kernel_directory=kernel_directory(),
        expects=workload.lengths(),
        objective=options.objective,
        codec=asked_codec(options),
        kv_scratch=options.kv_scratch or (options.scratch if options.shape or options.dummy else None),
        **settings,
    ) as llm:

        def show(state: Progress) -> None:
            done = f"{state.generated_tokens} of {state.expected_tokens} tokens"
            progress.show(f"a pass of {state.schedule.num_tokens} tokens has ended, {done} so far")

        report = bench.run_bench(llm, workload, peaks, settings=asked, on_pass=show)
        if trace:
            trace.write(options.trace)
    return report
