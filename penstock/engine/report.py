"""What a run did: bytes per link, seconds, tokens, and where everything was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.offload.plan import Plan
from penstock.offload.stream import StreamStatistics
from penstock.offload.tiers import Tier

__all__ = ["Progress", "RunReport", "Traffic"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and seconds of the links during a run.

    `disk_busy_seconds` is the time with at least one read under way; `stall_seconds` the time in which computing waited
    for weights.
    """

    disk_bytes: int
    disk_busy_seconds: float
    device_bytes: int
    stall_seconds: float
    buffered_reads: int

    @classmethod
    def between(cls, before: StreamStatistics, after: StreamStatistics) -> Traffic:
        """Return what moved between two snapshots."""
        return cls(
            disk_bytes=after.disk.bytes_read - before.disk.bytes_read,
            disk_busy_seconds=after.disk.busy_seconds - before.disk.busy_seconds,
            device_bytes=after.device_bytes - before.device_bytes,
            stall_seconds=after.stall_seconds - before.stall_seconds,
            buffered_reads=after.disk.buffered_reads - before.disk.buffered_reads,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; of requests from an iterator, those that were read."""

    num_requests: int
    num_finished: int
    num_running: int
    prompt_tokens: int
    generated_tokens: int
    expected_tokens: int
    seconds: float
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class RunReport:
    """One call of `generate`, for people and for JSON.

    `peak_process_nbytes` is the most RAM that the process ever held, libraries included; on the CPU that includes the
    device budget. `peak_device_nbytes` is the most that tensors took on a GPU since loading began.
    """

    num_requests: int
    num_passes: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    load_seconds: float
    load_bytes: int
    peak_sequences: int
    peak_process_nbytes: int
    peak_device_nbytes: int
    model_nbytes: int
    traffic: Traffic
    plan: Plan
    device: str
    dtype: str
    reader: dict[str, Any]

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
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "load": {"seconds": self.load_seconds, "bytes": self.load_bytes},
            "links": {
                "nvme_to_host": {
                    "bytes": self.traffic.disk_bytes,
                    "busy_seconds": self.traffic.disk_busy_seconds,
                    "buffered_reads": self.traffic.buffered_reads,
                },
                "host_to_device": {"bytes": self.traffic.device_bytes},
            },
            "stalls": {"weights_seconds": self.traffic.stall_seconds},
            "reader": self.reader,
            "layers": {str(tier): tiers.count(str(tier)) for tier in Tier},
            "plan": plan,
            "memory": {
                "peak_process_bytes": self.peak_process_nbytes,
                "peak_device_bytes": self.peak_device_nbytes,
            },
            "model_bytes": self.model_nbytes,
            "peak_sequences": self.peak_sequences,
            "device": self.device,
            "dtype": self.dtype,
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
        ]
        return "\n".join(lines)
