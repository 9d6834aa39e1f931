"""Run language models far bigger than the GPU on one GPU, with layers streamed from host RAM and NVMe."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.engine.llm import LLM
    from penstock.engine.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
    from penstock.engine.request import Request, ScoreRequest
    from penstock.engine.sampling_params import SamplingParams
    from penstock.errors import PenstockError
    from penstock.io.settings import ReadSettings
    from penstock.offload.tiers import MemoryTiers

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "MemoryTiers",
    "PenstockError",
    "ReadSettings",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "ScoreRequest",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "penstock.engine.llm",
    "CompletionOutput": "penstock.engine.outputs",
    "Logprob": "penstock.engine.outputs",
    "MemoryTiers": "penstock.offload.tiers",
    "PenstockError": "penstock.errors",
    "ReadSettings": "penstock.io.settings",
    "Request": "penstock.engine.request",
    "RequestOutput": "penstock.engine.outputs",
    "SamplingParams": "penstock.engine.sampling_params",
    "ScoreOutput": "penstock.engine.outputs",
    "ScoreRequest": "penstock.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that the command line starts without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
