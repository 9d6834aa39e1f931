"""Measure a model: prefill and decode apart, each link and the arithmetic against what they can do in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penstock.engine.flops import ModelFlops, count_flops
from penstock.engine.forecast import Forecast, Length
from penstock.engine.llm import LLM
from penstock.engine.rates import rates_of
from penstock.engine.report import Progress, RunReport, Traffic
from penstock.engine.sampling_params import SamplingParams
from penstock.errors import ConfigError, ProfileError
from penstock.offload.peaks import Peaks, measure_peaks

__all__ = ["BenchReport", "Phase", "Workload", "forget_peak_memory", "measure_peaks", "run_bench"]


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch_size` prompts of `prompt_len` random tokens, each completed with `gen_len` greedy tokens."""

    prompt_len: int
    gen_len: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "gen_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is out of range", wanted="at least 1", got=getattr(self, name))

    def lengths(self) -> list[Length]:
        """Return the lengths of the requests."""
        return [Length(self.prompt_len, self.gen_len)] * self.batch_size

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Return the prompts."""
        numbers = random.Random(self.seed)  # noqa: S311 - not for secrets
        return [[numbers.randrange(vocab_size) for _ in range(self.prompt_len)] for _ in range(self.batch_size)]


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a run stands at the end of a pass."""

    seconds: float
    passes: int
    prompt_tokens: int
    tokens: int
    generated: int
    flops: int
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Phase:
    """Consecutive passes of one kind. `tokens` went through the layers, `generated` came out.

    `time` shares out the phase's seconds; the shares add up to 1:

    - `computing`: inside the layers, with the layer there. Gaps between kernels count here.
    - `nvme`: the device had nothing to do until a layer that lives on NVMe had been read and copied.
    - `host_to_device`: the same for a layer that lives in host RAM.
    - `attention_in_host`: the same for attention of sequences whose keys and values are in host RAM.
    - `outside_layers`: from leaving the last layer to entering the first again: head, choosing tokens, scheduling,
      embedding. The link goes on with the next layers meanwhile.
    """

    passes: int
    seconds: float
    tokens: int
    generated: int
    flops: int | None
    traffic: Traffic

    @classmethod
    def between(cls, begin: _Mark, end: _Mark, *, has_flops: bool) -> Phase:
        """Return what happened from one mark to a later one."""
        return cls(
            passes=end.passes - begin.passes,
            seconds=end.seconds - begin.seconds,
            tokens=end.tokens - begin.tokens,
            generated=end.generated - begin.generated,
            flops=end.flops - begin.flops if has_flops else None,
            traffic=end.traffic - begin.traffic,
        )

    @property
    def time(self) -> dict[str, float]:
        """The shares of the phase's time by cause."""
        traffic = self.traffic
        parts = {
            "computing": traffic.layers_seconds - traffic.stall_seconds - traffic.attention_stall_seconds,
            "nvme": traffic.disk_stall_seconds,
            "host_to_device": traffic.host_stall_seconds,
            "attention_in_host": traffic.attention_stall_seconds,
            "outside_layers": self.seconds - traffic.layers_seconds,
        }
        parts = {name: max(seconds, 0.0) for name, seconds in parts.items()}
        total = sum(parts.values()) or 1.0
        return {name: seconds / total for name, seconds in parts.items()}

    def as_dict(self, peaks: Peaks, dtype: str) -> dict[str, Any]:
        """Return the phase for JSON, with shares of the peaks; what is unknown is null."""
        seconds = self.seconds or 1e-9
        rate = None if self.flops is None else self.flops / seconds
        return {
            "passes": self.passes,
            "seconds": self.seconds,
            "seconds_per_pass": self.seconds / self.passes,
            "tokens": self.tokens,
            "tokens_per_pass": self.tokens / self.passes,
            "generated_tokens": self.generated,
            "flops": self.flops,
            "tflops": None if rate is None else rate / 1e12,
            "share_of_matmul": _share(rate, peaks.matmul.get(dtype)),
            "links": {
                "host_to_device": _link(self.traffic.device_bytes, seconds, peaks.host_to_device),
                "nvme_to_host": _link(self.traffic.disk_bytes, seconds, peaks.disk.bytes_per_second),
            },
            "weights": _weights(self.traffic, seconds, peaks.host_to_device),
            "time": self.time,
        }


def _weights(traffic: Traffic, seconds: float, peak: float | None) -> dict[str, float | None]:
    """Return at which rate weights arrived, as they are computed with, and what expanding them took."""
    moving = traffic.transfer_seconds
    return {
        "decoded_bytes": traffic.decoded_bytes,
        "gbps": traffic.decoded_bytes / seconds / 1e9,
        "share_of_link_peak": _share(traffic.decoded_bytes / seconds, peak),
        "transfer_seconds": moving,
        "expand_seconds": traffic.expand_seconds,
        "expand_share_of_transfer": traffic.expand_seconds / moving if moving else None,
    }


def _link(nbytes: int, seconds: float, peak: float | None) -> dict[str, float | None]:
    return {"bytes": nbytes, "gbps": nbytes / seconds / 1e9, "share_of_peak": _share(nbytes / seconds, peak)}


def _share(rate: float | None, peak: float | None) -> float | None:
    return None if rate is None or not peak else rate / peak


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What a bench measured. `steady` is decode without its first pass, which finds layers that prefill has fetched.

    `decode` is None when each prompt got one token, `steady` too when decode was a single pass. `forecast` is what the
    peaks would have had the run take.
    """

    workload: Workload
    prefill: Phase
    decode: Phase | None
    steady: Phase | None
    run: RunReport
    peaks: Peaks
    flops: ModelFlops | None
    forecast: Forecast | None
    settings: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of prefill and decode together."""
        return self.run.generated_tokens / (self.prefill.seconds + (self.decode.seconds if self.decode else 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: bytes, seconds, FLOPs; rates per second."""

        def phase(one: Phase | None) -> dict[str, Any] | None:
            return None if one is None else one.as_dict(self.peaks, self.run.product_dtype)

        run = self.run.as_dict()
        kept = (
            "attention_in_host",
            "codec",
            "device",
            "dtype",
            "kv_on_nvme",
            "layers",
            "load",
            "memory",
            "model_bytes",
            "peak_sequences",
        )
        return {
            "settings": self.settings,
            "prompt_len": self.workload.prompt_len,
            "gen_len": self.workload.gen_len,
            "batch_size": self.workload.batch_size,
            "tokens_per_second": self.tokens_per_second,
            "prefill_seconds": self.prefill.seconds,
            "prefill": phase(self.prefill),
            "decode": phase(self.decode),
            "decode_steady": phase(self.steady),
            "peaks": self.peaks.as_dict(),
            "forecast": self.forecast.as_dict() if self.forecast else None,
            "parameters": self.flops.parameters if self.flops else None,
            "flops_per_token": self.flops.per_token if self.flops else None,
            **{name: run[name] for name in (*kept, "plan", "reader")},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def explain(self) -> str:
        """Say in a few lines what was measured."""
        work = self.workload
        lines = [
            self.run.plan.explain(),
            f"{self.run.generated_tokens} tokens for {work.batch_size} prompts of {work.prompt_len}: "
            f"{self.tokens_per_second:.2f} tokens/s, up to {self.run.peak_sequences} sequences at once",
        ]
        for name, phase in (("prefill", self.prefill), ("decode", self.decode), ("steady", self.steady)):
            if phase is not None:
                lines += _explain(name, phase.as_dict(self.peaks, self.run.product_dtype))
        if self.forecast:
            share = self.tokens_per_second / self.forecast.tokens_per_second
            lines.append(f"{self.forecast.explain()}; {share:.1%} of that was reached")
        return "\n".join(lines)


def _explain(name: str, phase: dict[str, Any]) -> list[str]:
    links = [
        f"{label} {link['gbps']:.2f} GB/s{_of(link['share_of_peak'])}"
        for label, link in zip(("host → device", "nvme → host"), phase["links"].values(), strict=True)
    ]
    tflops = "" if phase["tflops"] is None else f", {phase['tflops']:.3g} TFLOPS{_of(phase['share_of_matmul'])}"
    shares = ", ".join(f"{cause.replace('_', ' ')} {share:.1%}" for cause, share in phase["time"].items())
    return [
        f"{name:8}{phase['seconds']:.3f} s in {phase['passes']} passes of {phase['tokens_per_pass']:.0f} tokens, "
        f"{phase['seconds_per_pass']:.3f} s each{tflops}",
        f"{'':8}{'; '.join(links)}",
        f"{'':8}{_explain_weights(phase['weights'])}",
        f"{'':8}{shares}",
    ]


def _explain_weights(weights: dict[str, Any]) -> str:
    share, expanding = weights["share_of_link_peak"], weights["expand_share_of_transfer"]
    text = f"weights as computed with {weights['gbps']:.2f} GB/s"
    text += "" if share is None else f", {share:.2f} of the link's peak"
    return text + ("" if not expanding else f"; expanding took {expanding:.1%} of the time of their transfers")


def _of(share: float | None) -> str:
    return " (peak unknown)" if share is None else f" ({share:.1%} of the peak)"


def run_bench(
    llm: LLM,
    workload: Workload,
    peaks: Peaks,
    *,
    settings: dict[str, Any],
    on_pass: Callable[[Progress], None] | None = None,
) -> BenchReport:
    """Run a workload through a model and measure its phases; measures the disk's peak once more afterwards.

    A pass ends, for the clock, when its tokens have been chosen, which waits for the device. Passes with prompt tokens
    are prefill. Raises ConfigError when a prompt and its tokens exceed the model's context.
    """
    limit = llm.context_length
    if limit is not None and workload.prompt_len + workload.gen_len > limit:
        wanted = f"prompt_len + gen_len of at most {limit}"
        raise ConfigError("the workload exceeds the model's context", wanted=wanted, got=workload)
    flops = count_flops(llm.model)
    marks: list[_Mark] = []

    def note(state: Progress) -> None:
        marks.append(_mark(marks[-1] if marks else None, state, flops))
        if on_pass:
            on_pass(state)

    params = SamplingParams(max_tokens=workload.gen_len, temperature=0.0, ignore_eos=True)
    for _ in llm.stream(workload.prompts(llm.model.vocab_size), params, on_pass=note):
        pass
    assert llm.last_run is not None
    if llm.plan.nvme_nbytes:
        llm.settle()
        peaks.disk.measure()
    prefill, decode, steady = _phases(marks, has_flops=flops is not None)
    foreseen = _foresee(llm, workload, peaks)
    return BenchReport(workload, prefill, decode, steady, llm.last_run, peaks, flops, foreseen, settings)


def _foresee(llm: LLM, workload: Workload, peaks: Peaks) -> Forecast | None:
    """Return what the peaks would have had the run take; None where one of them is not known."""
    assert llm.last_run is not None
    try:
        return llm.foresee(rates_of(peaks, llm.model, llm.path), workload.lengths())
    except ProfileError:
        return None


def _mark(last: _Mark | None, state: Progress, flops: ModelFlops | None) -> _Mark:
    spans = [span for batch in state.schedule.micro_batches for span in batch]
    rows = state.generated_tokens - (last.generated if last else 0)
    return _Mark(
        seconds=state.seconds,
        passes=(last.passes if last else 0) + 1,
        prompt_tokens=state.prompt_tokens,
        tokens=(last.tokens if last else 0) + state.schedule.num_tokens,
        generated=state.generated_tokens,
        flops=(last.flops if last else 0) + (flops.of(spans, rows=rows) if flops else 0),
        traffic=state.traffic,
    )


def _phases(marks: Sequence[_Mark], *, has_flops: bool) -> tuple[Phase, Phase | None, Phase | None]:
    """Cut a run into prefill, decode, and decode without its first pass."""
    start = _Mark(0.0, 0, 0, 0, 0, 0, marks[0].traffic - marks[0].traffic)
    filled = next(number for number, mark in enumerate(marks) if mark.prompt_tokens == marks[-1].prompt_tokens)

    def phase(begin: _Mark, end: _Mark) -> Phase | None:
        return Phase.between(begin, end, has_flops=has_flops) if end.passes > begin.passes else None

    prefill = Phase.between(start, marks[filled], has_flops=has_flops)
    steady = phase(marks[filled + 1], marks[-1]) if filled + 1 < len(marks) else None
    return prefill, phase(marks[filled], marks[-1]), steady


def forget_peak_memory() -> bool:
    """Let the kernel count this process's peak of resident memory anew; False where it does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
