"""Decoder layers compiled once per kind: layers of one class, with parts, parameters and dtypes that are the same.

torch.compile gets each layer as an argument of one function per kind, so a kind's layers share their code: what it
guards are types, shapes and settings, never addresses. Attention is opaque to it (`engine/model/opaque.py`). Token
counts are dynamic, except that one token alone runs eagerly, where there is nothing to fuse. So do micro-batches that
may switch to the executor inside a layer, since what attention is opaque to must not be left and entered again, and
those that read packed weights, which a GPU records.

All compiling happens at start-up. What fails then, or would have to be compiled again in a pass, runs eagerly from
there on, its whole kind, and the log and the report say why.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend, mark_dynamic
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor import config
from torch.utils._pytree import tree_leaves

from penstock.engine.batch import CURRENT, MicroBatch
from penstock.engine.model.adapters import UNTRACEABLE
from penstock.engine.model.opaque import LAYER, name_modules

__all__ = ["Compilation", "LayerCompiler", "why_not_compile"]

MAX_GRAPHS = 4
"""Graphs of one kind: settings may differ between its layers, such as the window of their attention."""
MAX_OPERATIONS = 2000
"""Operations in one graph. A layer has some dozens; a loop over experts that was unrolled would compile for minutes."""

_numbers = itertools.count()

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class Compilation:
    """What was compiled: for each kind of layer, its name and why it runs eagerly, or None; and what it took."""

    kinds: tuple[tuple[str, str | None], ...]
    seconds: float

    @property
    def num_compiled(self) -> int:
        """Kinds that run compiled."""
        return sum(reason is None for _, reason in self.kinds)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "kinds": len(self.kinds),
            "compiled": self.num_compiled,
            "eager": {name: reason for name, reason in self.kinds if reason},
            "seconds": self.seconds,
        }

    def explain(self) -> str:
        """Say in one line what is compiled."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.kinds if reason)
        return f"{self.num_compiled} of {len(self.kinds)} kinds of layers compiled" + (
            f" ({reasons})" if reasons else ""
        )


def why_not_compile(device: torch.device) -> str | None:
    """Say why layers should not be compiled on this device when nobody has decided; None where they should."""
    if device.type != "cuda":
        return "not worth the time to compile on the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "there is no C compiler"
    return None


class LayerCompiler:
    """Gives `layers` forwards that run compiled once `compiling` has been entered, and eagerly before and otherwise.

    Must come before whatever else wraps the forwards. Eager calls cost nothing more than a look at a field. `backend`
    is one of torch.compile's.
    """

    def __init__(self, layers: Sequence[nn.Module], *, backend: str = "inductor") -> None:
        self._kinds: list[_Kind] = []
        self._seconds = 0.0
        known: dict[Any, _Kind] = {}
        for index, layer in enumerate(layers):
            name_modules(layer)
            structure = _structure(layer)
            if structure not in known:
                number = sum(kind.layer_class is type(layer) for kind in self._kinds)
                name = f"{type(layer).__name__}{f' {number + 1}' if number else ''}"
                known[structure] = _Kind(type(layer), name, backend)
                self._kinds.append(known[structure])
            known[structure].layers.append(index)
            _install(layer, known[structure])

    def leave_eager(self, reason: str) -> None:
        """Run every layer eagerly from now on, for this reason."""
        for kind in self._kinds:
            kind.code, kind.reason = None, reason
        logger.info("layers are not compiled: %s", reason)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Enter to run passes in which the layers of every kind are met and compiled; nothing is afterwards."""
        start = time.perf_counter()
        for kind in self._kinds:
            kind.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compilers are not the user's
            yield
        for kind in self._kinds:
            kind.is_sealed = True
        self._seconds += time.perf_counter() - start
        logger.info("%s in %.1f s", self.report().explain(), self._seconds)

    def report(self) -> Compilation:
        """Return what is compiled now."""
        return Compilation(tuple((kind.name, kind.reason) for kind in self._kinds), self._seconds)


class _NotCompilableError(Exception):
    """Raised towards the compiler that calls us, so that it gives up before anything has run."""


@dataclass(slots=True)
class _Kind:
    """Layers that share their code. `code` is None where they run eagerly."""

    layer_class: type[nn.Module]
    name: str
    backend: str
    reason: str | None = None
    code: Callable[..., Any] | None = None
    is_sealed: bool = False
    num_graphs: int = 0
    layers: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Get a function of its own, so that guards and limits are those of this kind alone."""
        if self.reason is not None:
            return
        forward = self.layer_class.forward

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(layer, *args, **kwargs)

        # The compiler keeps what it has made by code object, and what it has learnt by the code's name.
        run.__code__ = run.__code__.replace(co_name=f"run_{next(_numbers)}")
        try:
            self.code = torch.compile(run, backend=self._compile, fullgraph=True)
        except Exception as error:  # noqa: BLE001 - it looks for its cache, for one
            self.give_up(error)

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Be torch.compile's backend: inductor within our limits."""
        if self.is_sealed:
            raise _NotCompilableError("a pass differs from what start-up has compiled")
        if self.num_graphs == MAX_GRAPHS:
            raise _NotCompilableError(f"its layers need more than {MAX_GRAPHS} graphs")
        if len(graph.graph.nodes) > MAX_OPERATIONS:
            raise _NotCompilableError(f"a graph of {len(graph.graph.nodes)} operations")
        with config.patch(emulate_precision_casts=True):  # round where eager code does, so that tokens are the same
            made: Callable[..., Any] = lookup_backend(self.backend)(graph, inputs)  # type: ignore[arg-type]
        self.num_graphs += 1
        return made

    def give_up(self, error: Exception) -> None:
        """Run eagerly from now on."""
        self.code, self.reason = None, _brief(error)
        logger.warning("%s (%d layers) is not compiled: %s", self.name, len(self.layers), self.reason)


def _install(layer: nn.Module, kind: _Kind) -> None:
    eager = layer.forward
    kind.reason = kind.reason or _own_code(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kind.code is None or _runs_eagerly(CURRENT.get()):
            return eager(*args, **kwargs)
        LAYER.set(layer)
        if not kind.is_sealed:
            _make_dynamic((args, kwargs), size=CURRENT.get().num_tokens)
        try:
            return kind.code(layer, *args, **kwargs)
        except Exception as error:
            if kind.is_sealed and not isinstance(error, TorchDynamoException | FailOnRecompileLimitHit):
                raise
            kind.give_up(error)  # compilers fail before anything runs; any other error comes again, eagerly
            return eager(*args, **kwargs)

    layer.forward = forward


def _runs_eagerly(batch: MicroBatch) -> bool:
    """One token, and what compiled code must not do: switch to the executor, and read packed weights."""
    is_one_token = len(batch.spans) == 1 and batch.spans[0].length == 1
    return is_one_token or batch.parks or batch.reads_packed


def _make_dynamic(inputs: Any, *, size: int) -> None:
    """Let the dimensions that have this size have any size in the code that is made."""
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            for dim in (dim for dim, one in enumerate(tensor.shape) if one == size):
                mark_dynamic(tensor, dim)


def _own_code(layer: nn.Module) -> str | None:
    """Name the adapter in a layer that no compiler can trace, if there is one."""
    found = (getattr(module, UNTRACEABLE, None) for module in layer.modules())
    return next((f"{name} is not traceable" for name in found if name), None)


def _structure(layer: nn.Module) -> Any:
    """Return what layers of one kind have in common."""
    return (
        tuple((name, type(module)) for name, module in layer.named_modules()),
        tuple((name, tensor.shape, tensor.dtype) for name, tensor in layer.named_parameters()),
        _own_code(layer),
    )


def _brief(error: Exception) -> str:
    """Return what a compiler's error says first; its own root cause where it wraps one."""
    cause: BaseException = getattr(error, "inner_exception", None) or error
    said = " ".join(line.strip() for line in str(cause).splitlines()[:3]).strip()
    return said if isinstance(cause, _NotCompilableError) else f"{type(cause).__name__}: {said}"[:240]
