"""What every command that runs a model asks for: the model and the memory that it may use."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from penstock.cli.codec import add_codec, asked_codec
from penstock.cli.output import ProgressLine
from penstock.cli.settings import add_read_options, kernel_directory, read_settings, stored_profile
from penstock.io.interrupts import held_back
from penstock.offload.codec import ACTIVATION_DTYPES
from penstock.offload.tiers import MemoryTiers, format_size

if TYPE_CHECKING:
    from penstock.engine.llm import LLM

__all__ = ["add_memory", "open_llm", "tiers_of"]


def add_memory(parser: Any) -> Any:
    """Add the options of memory and device to a command; return their group."""
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--device-memory", metavar="SIZE", help="budget on the device, such as 20GiB (default: most of it)"
    )
    memory.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="budget of host RAM for layers (default: most of it); of dummy weights, whose aliases share their bytes, "
        "more than there is",
    )
    memory.add_argument(
        "--kv-host-memory",
        metavar="SIZE",
        help="the part of the host budget for keys and values of further sequences, whose attention is computed there "
        "(default: what is forecast to be best, where that is known; else none)",
    )
    memory.add_argument(
        "--kv-nvme",
        metavar="SIZE",
        default=0,
        help="a scratch file for keys and values of still more sequences, or longer ones; they are read into a small "
        "part of the host budget (default: none)",
    )
    memory.add_argument(
        "--kv-scratch",
        metavar="DIR",
        help="where that file lies, without a name (default: the model's directory if it can be written, or /var/tmp)",
    )
    memory.add_argument("--nvme", metavar="SIZE", help="how much may be left on disk (default: any amount)")
    memory.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    memory.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: the checkpoint's)"
    )
    memory.add_argument(
        "--kv-dtype",
        default="auto",
        help="what keys and values rest as: auto (as they come), bf16, or quantised: fp8, int8, int4 "
        "(default: %(default)s)",
    )
    memory.add_argument(
        "--activation-dtype",
        choices=ACTIVATION_DTYPES,
        default="auto",
        help="what packed weights are multiplied with: auto (the run's dtype), or fp8, where both are rounded to e4m3; "
        "faster on GPUs from compute capability 8.9 on (default: %(default)s)",
    )
    memory.add_argument(
        "--micro-batch-tokens", type=int, metavar="N", help="tokens that go through a layer in one call"
    )
    memory.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="compile each kind of layer at start-up (default: on a GPU)",
    )
    memory.add_argument(
        "--objective",
        choices=("throughput", "latency"),
        default="throughput",
        help="plan for the whole job's end, or for that of a request on average (default: %(default)s)",
    )
    add_read_options(memory)
    add_codec(parser)
    return memory


def tiers_of(options: argparse.Namespace) -> MemoryTiers:
    """Return the budgets. Raises SizeError."""
    return MemoryTiers(
        device=options.device_memory,
        host=options.host_memory,
        nvme=options.nvme,
        kv_host=options.kv_host_memory,
        kv_nvme=options.kv_nvme,
    )


def open_llm(options: argparse.Namespace, tiers: MemoryTiers, progress: ProgressLine, **more: Any) -> LLM:
    """Load the model, and show how far that is; `more` goes to `LLM` as it is."""
    with held_back():  # some libraries swallow an exit that comes while they are imported
        from penstock.engine import llm as engine  # noqa: PLC0415 - torch takes seconds to import; --help must not

    codec = asked_codec(options)
    model = options.model or engine.DEFAULT_MODEL
    profile = stored_profile(model)
    settings = read_settings(options, model, profile)
    llm = engine.LLM(
        options.model,
        tiers=tiers,
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        activation_dtype=options.activation_dtype,
        micro_batch_tokens=options.micro_batch_tokens,
        io=settings,
        compile=options.compile,
        hardware=profile,
        kernel_directory=kernel_directory(),
        on_load=lambda done, total: progress.show(f"loading {format_size(done)} of {format_size(total)}"),
        objective=options.objective,
        codec=codec,
        kv_scratch=options.kv_scratch,
        **more,
    )
    progress.clear()
    print(f"penstock: {llm.outlook()}", file=sys.stderr)
    return llm
