"""What a run did: bytes per link, seconds, tokens, and where everything was."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from penstock.engine.forecast import Forecast
from penstock.engine.model.compile import Compilation
from penstock.engine.scheduler import Schedule
from penstock.engine.startup import StartUp
from penstock.offload.cost import COMPUTING, HOST_ATTENTION, HOST_TO_DEVICE, NVME_TO_HOST
from penstock.offload.homes import HomesStatistics
from penstock.offload.plan import Plan
from penstock.offload.stream import StreamStatistics
from penstock.offload.tiers import Tier, format_size

__all__ = ["Progress", "Reckoning", "RunReport", "Traffic"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and seconds of the links during a run.

    `disk_busy_seconds` is the time with at least one read under way. Computing waited `disk_stall_seconds` for layers
    from NVMe and `host_stall_seconds` for layers from host RAM, within the `layers_seconds` of going through them all;
    and there, `attention_stall_seconds` for the `attention_seconds` of attention beside the device, and for the
    `kv_disk_seconds` that reading and writing keys and values on NVMe took. `decoded_bytes` are those of the parameters
    that the `device_bytes` were decoded to; bringing layers from host RAM took `transfer_seconds`, expanding and
    converting what had arrived `expand_seconds`.
    """

    disk_bytes: int
    disk_busy_seconds: float
    device_bytes: int
    disk_stall_seconds: float
    host_stall_seconds: float
    layers_seconds: float
    buffered_reads: int
    attention_seconds: float = 0.0
    attention_stall_seconds: float = 0.0
    decoded_bytes: int = 0
    transfer_seconds: float = 0.0
    expand_seconds: float = 0.0
    kv_read_bytes: int = 0
    kv_written_bytes: int = 0
    kv_disk_seconds: float = 0.0

    @property
    def stall_seconds(self) -> float:
        """For how long computing waited for weights."""
        return self.disk_stall_seconds + self.host_stall_seconds

    def __sub__(self, other: Traffic) -> Traffic:
        """Return what moved since `other`."""
        return Traffic(*(mine - before for mine, before in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, stream: StreamStatistics, homes: HomesStatistics) -> Traffic:
        """Return what has moved since the start."""
        return cls(
            disk_bytes=stream.disk.bytes_read,
            disk_busy_seconds=stream.disk.busy_seconds,
            device_bytes=stream.device_bytes,
            disk_stall_seconds=stream.disk_stall_seconds,
            host_stall_seconds=stream.host_stall_seconds,
            layers_seconds=stream.layers_seconds,
            buffered_reads=stream.disk.buffered_reads,
            attention_seconds=homes.attention_seconds,
            attention_stall_seconds=homes.waited_seconds,
            decoded_bytes=stream.decoded_bytes,
            transfer_seconds=stream.transfer_seconds,
            expand_seconds=stream.expand_seconds,
            kv_read_bytes=homes.disk.read_bytes,
            kv_written_bytes=homes.disk.written_bytes,
            kv_disk_seconds=homes.disk.seconds,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after a pass; `schedule` is that pass. Of requests from an iterator, those that were read.

    `recomputed_tokens` went through the model again, after sequences were preempted; no other number counts them.
    """

    num_requests: int
    num_finished: int
    num_running: int
    prompt_tokens: int
    generated_tokens: int
    expected_tokens: int
    num_preemptions: int
    recomputed_tokens: int
    seconds: float
    schedule: Schedule
    traffic: Traffic

    @property
    def streamed_bytes(self) -> int:
        """Bytes that went to the device so far."""
        return self.traffic.device_bytes


@dataclass(frozen=True, slots=True)
class Reckoning:
    """Seconds that were forecast of a resource, or of all, and those that it took; None where that was not timed."""

    name: str
    forecast_seconds: float
    seconds: float | None

    def __str__(self) -> str:
        reached = "not timed" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"{self.name.replace('_', ' ')} {reached} of {self.forecast_seconds:.2f} s forecast"

    def as_dict(self) -> dict[str, float | None]:
        """Return it for JSON."""
        return {"forecast_seconds": self.forecast_seconds, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class RunReport:
    """One call of `generate`, for people and for JSON.

    `first_token_seconds` counts from the call, `start_up` from the start of the process to the model's being there.
    Of the `peak_sequences` at once, up to `peak_hosted` had their keys and values in host RAM, `peak_on_nvme` on NVMe.
    `peak_process_nbytes` is the most RAM that the process ever held, libraries included; on the CPU that includes the
    device budget. Once there was a plan, it was to be `planned_process_nbytes`, were all memory used.
    `peak_device_nbytes` is the most that tensors took on a GPU since loading began. Sequences gave way to older ones
    `num_preemptions` times, for which `recomputed_tokens` went through the model again; no other number counts them.
    `codec` is what layers were packed with on load. Most matrix products are in `product_dtype`. Of the passes,
    `recorded_passes` were played as they had been recorded once, or were the first of their kind.
    """

    num_requests: int
    num_passes: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    start_up: StartUp
    first_token_seconds: float
    load_bytes: int
    peak_sequences: int
    num_preemptions: int
    recomputed_tokens: int
    planned_process_nbytes: int
    peak_process_nbytes: int
    peak_device_nbytes: int
    model_nbytes: int
    traffic: Traffic
    plan: Plan
    device: str
    dtype: str
    reader: dict[str, Any]
    compilation: Compilation
    forecast: Forecast | None = None
    peak_hosted: int = 0
    codec: str | None = None
    activation_dtype: str = "auto"
    product_dtype: str = ""
    peak_on_nvme: int = 0
    recorded_passes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of prefill and decode together."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: bytes and seconds only."""
        plan = self.plan.as_dict()
        tiers = plan.pop("tiers")
        return {
            "requests": self.num_requests,
            "passes": self.num_passes,
            "recorded_passes": self.recorded_passes,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "load": {
                "seconds": sum(self.start_up.seconds.values()) - self.start_up.seconds["python"],
                "bytes": self.load_bytes,
                "steps": self.start_up.seconds,
            },
            "links": {
                "nvme_to_host": {
                    "bytes": self.traffic.disk_bytes,
                    "busy_seconds": self.traffic.disk_busy_seconds,
                    "buffered_reads": self.traffic.buffered_reads,
                },
                "host_to_device": {"bytes": self.traffic.device_bytes},
            },
            "stalls": {
                "weights_seconds": self.traffic.stall_seconds,
                "nvme_seconds": self.traffic.disk_stall_seconds,
                "host_to_device_seconds": self.traffic.host_stall_seconds,
                "attention_in_host_seconds": self.traffic.attention_stall_seconds,
            },
            "attention_in_host": {
                "peak_sequences": self.peak_hosted,
                "busy_seconds": self.traffic.attention_seconds,
            },
            "kv_on_nvme": {
                "peak_sequences": self.peak_on_nvme,
                "read_bytes": self.traffic.kv_read_bytes,
                "written_bytes": self.traffic.kv_written_bytes,
                "busy_seconds": self.traffic.kv_disk_seconds,
            },
            "reader": self.reader,
            "layer_code": self.compilation.as_dict(),
            "forecast": self.forecast.as_dict() if self.forecast else None,
            "reckoning": {one.name: one.as_dict() for one in self.reckoning()},
            "layers": {str(tier): tiers.count(str(tier)) for tier in Tier},
            "plan": plan,
            "memory": {
                "planned_process_bytes": self.planned_process_nbytes,
                "peak_process_bytes": self.peak_process_nbytes,
                "peak_device_bytes": self.peak_device_nbytes,
            },
            "model_bytes": self.model_nbytes,
            "peak_sequences": self.peak_sequences,
            "preemptions": self.num_preemptions,
            "recomputed_tokens": self.recomputed_tokens,
            "device": self.device,
            "dtype": self.dtype,
            "kv_dtype": self.plan.kv_dtype,
            "codec": self.codec,
            "activation_dtype": self.activation_dtype,
        }

    def explain(self) -> str:
        """Say in a few lines what the run did."""
        disk, seconds = self.traffic, self.seconds or 1.0
        rate = disk.disk_bytes / disk.disk_busy_seconds / 1e9 if disk.disk_busy_seconds else 0.0
        lines = [
            f"{self.generated_tokens} tokens for {self.num_requests} prompts of {self.prompt_tokens} tokens in "
            f"{self.seconds:.2f} s ({self.tokens_per_second:.1f} tokens/s, {self.num_passes} passes, "
            f"up to {self.peak_sequences} at once)",
            f"nvme → host    {disk.disk_bytes / 1e6:.1f} MB in this run, {rate:.2f} GB/s while reading; "
            f"{self.reader['reason']}",
            f"host → device  {disk.device_bytes / 1e6:.1f} MB, {disk.device_bytes / seconds / 1e9:.2f} GB/s; "
            f"computing waited {disk.stall_seconds:.2f} s for weights",
            f"layer code     {self.compilation.explain()}"
            + (
                f"; {self.recorded_passes} of {self.num_passes} passes went as recorded" if self.recorded_passes else ""
            ),
            f"RAM            the process held up to {format_size(self.peak_process_nbytes)}; "
            f"{format_size(self.planned_process_nbytes)} were planned, libraries that load later not counted",
            f"start          {self.start_up.explain()}; the first token {self.first_token_seconds:.1f} s later",
        ]
        if self.plan.kv_host_nbytes:
            lines.append(
                f"host RAM       keys and values of up to {self.peak_hosted} sequences; attention there took "
                f"{disk.attention_seconds:.2f} s, computing waited {disk.attention_stall_seconds:.2f} s for it"
            )
        if self.plan.kv_nvme_nbytes:
            lines.append(
                f"NVMe           keys and values of up to {self.peak_on_nvme} sequences; "
                f"{disk.kv_read_bytes / 1e6:.1f} MB read and {disk.kv_written_bytes / 1e6:.1f} MB written in "
                f"{disk.kv_disk_seconds:.2f} s; computing waited {disk.attention_stall_seconds:.2f} s for attention"
            )
        if self.num_preemptions:
            lines.append(
                f"preempted      {self.num_preemptions} times a sequence gave its memory to an older one; "
                f"{self.recomputed_tokens} tokens went through the model again"
            )
        if self.forecast:
            lines.append(f"plan           {self.forecast.explain()}")
            lines.append(f"reached        {'; '.join(map(str, self.reckoning()))}")
        return "\n".join(lines)

    def reckoning(self) -> tuple[Reckoning, ...]:
        """Return what was forecast beside what was reached; nothing without a forecast.

        What each resource was busy with is compared only where that was timed. Seconds are those of the passes that
        were forecast: when there were others, they are as many times as long.
        """
        if self.forecast is None or not self.num_passes:
            return ()
        share = self.num_passes / self.forecast.passes
        traffic, busy = self.traffic, self.forecast.busy_seconds
        disk = None if self.plan.kv_nvme_nbytes else traffic.disk_busy_seconds  # of two readers, each by itself
        computing = traffic.layers_seconds - traffic.stall_seconds
        if HOST_ATTENTION in busy:  # else the processor that attends is the device, and is forecast to compute then
            computing -= traffic.attention_stall_seconds
        reached: dict[str, float | None] = {
            COMPUTING: computing,
            NVME_TO_HOST: disk,
            HOST_TO_DEVICE: None if self.plan.nvme_nbytes else traffic.transfer_seconds or None,  # from host RAM alone
            HOST_ATTENTION: traffic.attention_seconds,
        }
        whole = Reckoning("all", self.forecast.seconds * share, self.seconds)
        return whole, *(Reckoning(name, busy[name] * share, reached.get(name)) for name in busy if busy[name])
