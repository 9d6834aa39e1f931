"""A CUDA device for machines without one: its tensors say that they are on `cuda` and compute on the CPU.

It shows what a CPU device cannot: operations that mix devices, those that wait for the GPU, and copies that arrive
late. A copy to pinned memory arrives when an event after it is waited for, and until then the memory is full of 0xFF
bytes; what is copied from pinned memory must still be the same then. Values are the CPU's, so results can be compared.
There is one stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)

_DEVICE = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}  # type: ignore[attr-defined]
_LEAVES = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave"}
"""Operations whose results the CPU must know."""


class DeviceError(AssertionError):
    """An operation that a GPU would refuse, or that would wait for it."""


class There(Tensor):
    """A tensor of the device that is not there; `memory` is where it is."""

    memory: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device="cpu",
        )
        made.memory = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.memory!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DEVICE:
            return _DEVICE[func]
        if func in _OURS:
            return _OURS[func](*args, **kwargs)
        if func in _LEAVES:
            STREAM.drain(func.__name__)
            return func(*tree_map(_real, args), **tree_map(_real, kwargs))
        if func in {Tensor.__getitem__, Tensor.__setitem__} and _num_truths(args[1]):
            STREAM.drain("an index of truths")
        if func is scaled_dot_product_attention:  # made of many operations, some of which make tensors
            _check_together(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
            return There(func(*tree_map(_real, args), **tree_map(_real, kwargs)))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Stream:
    """Copies under way between pinned memory and the device, in order."""

    cuda_stream = 0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Tensor, Tensor, bool]] = []
        self._done = 0
        self.num_late = 0
        self.may_wait = False

    def drain(self, what: str) -> None:
        """Let everything end because of `what`, if that may be."""
        if not self.may_wait:
            raise DeviceError(f"{what} waits for the device")
        self.wait(self.issued())

    def wait_event(self, event: Any) -> None:
        """There is one stream, so it waits for nothing."""

    def wait_stream(self, stream: Any) -> None:
        """Nor for itself."""

    def synchronize(self) -> None:
        """Wait for everything."""
        self.wait(self.issued())

    def copy_back(self, memory: Tensor, rows: Tensor) -> None:
        """Let `rows` arrive in host memory later."""
        with self._lock:
            self._waiting.append((memory, rows.clone(), True))
            _bytes(memory).fill_(255)

    def copy_there(self, memory: Tensor) -> None:
        """Watch host memory that is being copied to the device."""
        with self._lock:
            self._waiting.append((memory, memory.clone(), False))

    def issued(self) -> int:
        """Return how many copies there have been."""
        with self._lock:
            return self._done + len(self._waiting)

    def wait(self, number: int) -> None:
        """Let the first `number` copies end."""
        with self._lock:
            while self._waiting and self._done < number:
                memory, rows, is_late = self._waiting.pop(0)
                self._done += 1
                if is_late:
                    memory.copy_(rows)
                    self.num_late += 1
                elif not torch.equal(_bytes(memory), _bytes(rows)):
                    raise DeviceError("memory was written while it was being copied to the device")


class Event:
    """An event of the only stream."""

    def __init__(self, **_: Any) -> None:
        self._number = 0

    def record(self, stream: Any = None) -> None:
        """Note the copies so far."""
        self._number = STREAM.issued()

    def synchronize(self) -> None:
        """Wait for them."""
        STREAM.wait(self._number)

    def query(self) -> bool:
        """Nothing says when the device gets there."""
        return False

    def elapsed_time(self, other: Event) -> float:
        """Say something."""
        return 1.0


STREAM = Stream()
_pinned: dict[int, Tensor] = {}
_registered: dict[int, int] = {}


class _ToCuda(TorchFunctionMode):
    """Sees what is asked of tensors of the CPU too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            STREAM.drain("torch.tensor")
            return There(func(*args, **{**kwargs, "device": "cpu"}))
        return _to(*args, **kwargs) if func is Tensor.to else func(*args, **kwargs)


class _OnCuda(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretend_cuda(monkeypatch: Any) -> Iterator[Stream]:
    """Enter to have the device `cuda` in this thread; others may work with host memory, and wait for events."""
    global STREAM  # noqa: PLW0603
    STREAM = Stream()
    here = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: STREAM.synchronize(),
        "cudart": lambda: _Runtime,
        "Event": Event,
        "Stream": lambda device=None: STREAM,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: STREAM,
        "device_of": lambda tensor: nullcontext(),
        "get_device_capability": lambda device=None: (7, 5),
    }
    for name, value in here.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which wrappers from outside have no views
    monkeypatch.setattr(threading.Thread, "run", _run_there(threading.Thread.run))
    with _ToCuda(), _OnCuda():
        yield STREAM
    _pinned.clear()
    _registered.clear()


def _run_there(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Return what threads that start from now on run: the same, with the device."""

    def inside(thread: threading.Thread) -> None:
        with _ToCuda(), _OnCuda():
            run(thread)

    return inside


class _Runtime:
    """The functions of CUDA's library that take memory of the host for copies."""

    @staticmethod
    def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        _registered[address] = nbytes
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:  # noqa: N802
        _registered.pop(address, None)
        return 0


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::").removesuffix("_out")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, There) for tensor in tensors]
    if name == "copy_":
        return _copy(*args)
    wants_pinned = kwargs.get("pin_memory")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    device = kwargs.get("device")
    on_device = any(there) or (device is not None and torch.device(device).type == "cuda")
    if on_device and device is not None:
        kwargs["device"] = torch.device("cpu")
    if any(there):
        if name in _WAITS:
            STREAM.drain(name)
        _check_together(func, tensors)
    if name == "histc" and any(there):
        args = (args[0].to(torch.float32), *args[1:])  # a GPU's takes integers too
    made = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    written = func._schema.arguments[0].alias_info if args else None
    if written is not None and written.is_write:
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if wants_pinned:
        _pinned[made.untyped_storage()._cdata] = made
    return tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, made) if on_device else made


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(into, There) == isinstance(source, There):
        _real(into).copy_(_real(source))
    elif isinstance(into, There):
        if source.dim() and not non_blocking:
            STREAM.drain("a copy to the device")
        into.memory.copy_(source)
        if _is_pinned(source):
            STREAM.copy_there(source)
    elif non_blocking and _is_pinned(into):
        STREAM.copy_back(into, _real(source).to(into.dtype).expand(into.shape))
    else:
        STREAM.drain("a copy from the device")
        into.copy_(_real(source))
    return into


def _to(source: Tensor, *args: Any, non_blocking: bool = False, **options: Any) -> Tensor:
    """Be `Tensor.to`: change the dtype, or take it to the device."""
    devices = [torch.device(one) for one in args if isinstance(one, str | torch.device)]
    devices += [torch.device(options.pop("device"))] if options.get("device") is not None else []
    dtypes = [one for one in args if isinstance(one, torch.dtype)]
    made = _real(source)
    made = made.to(*dtypes, **options) if dtypes or options else made
    if not devices or (devices[0].type == "cuda") == isinstance(source, There):
        return source if made is _real(source) else There(made) if isinstance(source, There) else made
    if devices[0].type != "cuda" or not non_blocking:
        STREAM.drain("a copy between the CPU and the device")
    if devices[0].type != "cuda":
        return made.clone()
    if non_blocking and _is_pinned(source):
        STREAM.copy_there(source)
    return There(made.clone())


_OURS = {Tensor.to: _to, Tensor.copy_: _copy, Tensor.data_ptr: lambda there: there.memory.data_ptr()}


def _real(value: Any) -> Any:
    return value.memory if isinstance(value, There) else value


def _bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous(), "copies are of memory that is one piece"
    return tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def on_memory(function: Callable[..., None]) -> Callable[..., None]:
    """Return a kernel of the device: a function of the CPU that gets the tensors' memory."""

    def kernel(*args: Any, rule: Any, **kwargs: Any) -> None:
        rule = rule if rule.sinks is None else replace(rule, sinks=_real(rule.sinks))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _check_together(function, tensors)
        function(*tree_map(_real, args), rule=rule, **tree_map(_real, kwargs))

    return kernel


def _is_pinned(tensor: Tensor) -> bool:
    if any(start <= tensor.data_ptr() < start + nbytes for start, nbytes in _registered.items()):
        return True
    return tensor.untyped_storage()._cdata in _pinned


def _num_truths(index: Any) -> int:
    kinds = {torch.bool, torch.uint8}
    return sum(isinstance(leaf, Tensor) and leaf.dtype in kinds for leaf in tree_leaves(index))


def _check_together(func: Any, tensors: list[Tensor]) -> None:
    """Numbers without dims may come from the CPU; other tensors are together."""
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
    if elsewhere and any(isinstance(tensor, There) for tensor in tensors):
        raise DeviceError(f"{func} mixes devices: {[tuple(one.shape) for one in elsewhere]} are on the CPU")
