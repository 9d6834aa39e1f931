"""The rates that a model's passes are forecast with: what was measured of the machine, and of this model on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from penstock.engine.executor import Executor
from penstock.engine.flops import count_flops
from penstock.engine.hosted_times import hosted_times
from penstock.engine.model.build import StreamedModel
from penstock.engine.rehearsal import call_seconds, layer_times
from penstock.errors import BudgetError
from penstock.offload.cost import Machine
from penstock.offload.hardware import HardwareProfile
from penstock.offload.peaks import Peaks
from penstock.offload.plan import ModelShape, PassLimits, make_plan
from penstock.offload.tiers import MemoryTiers

__all__ = ["measured", "rates_of"]

FP8_SHARE = 0.82
"""What layers reach of products in FP8, over what they reach of others: all that is beside the products takes as long
as beside those of bfloat16, and rounding what goes in comes to it. From one run of OPT-30B on an H200."""


def rates_of(hardware: HardwareProfile | Peaks | Machine, model: StreamedModel, path: Path) -> Machine:
    """Return the rates of passes in the dtype of a model at `path`, on its device. Raises OSError.

    Products of a dtype that was not measured count as those of the model's own.
    """
    known = hardware.matmul if isinstance(hardware, Peaks) else {}
    if isinstance(hardware, HardwareProfile):
        known = hardware.links.matmul
    dtype = model.product_dtype if model.product_dtype in known else str(model.dtype).removeprefix("torch.")
    if isinstance(hardware, Peaks):
        made = hardware.machine(dtype)
    elif isinstance(hardware, HardwareProfile):
        made = Machine.of(hardware, path, dtype=dtype, on_cpu=model.device.type == "cpu")
    else:
        return hardware
    return replace(made, flops=made.flops * FP8_SHARE) if dtype == "float8_e4m3fn" and made.flops else made


def measured(
    machine: Machine,
    model: StreamedModel,
    executor: Executor,
    shape: ModelShape,
    *,
    tiers: MemoryTiers,
    limits: PassLimits,
    kernel_directory: Path | None,
) -> Machine:
    """Add what layers take a CPU in micro-batches of the usual plan, or what issuing one takes it beside a GPU.

    With a GPU also what attention in host RAM takes, where there may be some. What is known already stays. Experts are
    not timed: over zeros, tokens all go to the same ones. Binds all layers to zeros.
    """
    flops = count_flops(model)
    if model.device.type == "cpu" and flops is not None and not flops.expert_nbytes:
        try:
            usual = make_plan(shape, tiers, limits)
        except BudgetError:  # the planner may find another one
            return machine
        times = layer_times(model, executor, num_tokens=usual.micro_batch_tokens, free_nbytes=usual.kv_nbytes)
        return replace(machine, layer_times=machine.layer_times or times)
    seconds = call_seconds(model, executor, reads=machine.device_memory)
    machine = replace(machine, call_seconds=machine.call_seconds or seconds)
    room = tiers.host if tiers.kv_host is None else tiers.kv_host
    on_gpu = model.device.type == "cuda"
    if on_gpu and machine.attention is None and room and not _fits_device(shape, tiers, limits):
        found = hosted_times(model, executor, shape, kernel_directory=kernel_directory, free_nbytes=room)
        machine = replace(machine, attention=found)
    return machine


def _fits_device(shape: ModelShape, tiers: MemoryTiers, limits: PassLimits) -> bool:
    """Say whether the device holds all layers, and the planner leaves keys and values there too."""
    try:
        return not make_plan(shape, tiers, replace(limits, device_layers=len(shape.layer_nbytes))).num_slots
    except BudgetError:
        return False
