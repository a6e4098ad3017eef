"""Pretends an accelerator: its tensors say that they are on cuda:0, and hold their elements on the host.

It shows on a machine without a GPU what code for devices does: an operation that mixes devices raises, as CUDA's would, and COUNTS counts
what costs time on a device (Counts). It computes with the host's kernels and says nothing about speed, streams or CUDA's own rounding.

No C++ and no global patch is needed: every torch function on a `DeviceTensor` comes to `__torch_function__`, before torch asks for a device
guard. Functions that make tensors (`torch.zeros(3, device="cuda:0")`) come here only inside of `pretended()`, which every thread enters by
itself.

A parameter can be on the device, too: autograd runs on what it holds, and its hooks get the DeviceTensor. Backward passes are not counted,
what their hooks do is.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..frameworks.torch.ops import TorchOps

DEVICE = torch.device("cuda:0")
#: Operations that only look at memory in another way: they launch nothing.
VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute", "_reshape_alias", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "_unsafe_view", "unsqueeze", "view",
}  # fmt: skip
#: Operations that allocate memory and do not set it.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: Operations whose CUDA kernels make the host wait, because the size or the value of their result must be known there.
WAITS = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "unique_consecutive",
    "unique_dim", "_unique2",
}  # fmt: skip
#: Questions to a tensor that CUDA answers only for tensors on the host.
HOST_ONLY = {"numpy", "__array__"}
#: Functions that run a backward pass, in which hooks run.
BACKWARD = {"backward", "grad"}


class Counts:
    """Counts what has run on the device since `clear`.

    launches: operations that run a kernel. waits: how often the host waited for the device. uploads, downloads: copies to and from it.
    read, written: bytes that kernels read and wrote. by_name: launches, waits and copies by operation."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.launches = self.waits = self.uploads = self.downloads = self.read = self.written = 0
        self.by_name: Counter[str] = Counter()

    def upload(self, waits: bool) -> None:
        self.uploads += 1
        self.waits += waits
        self.by_name["upload"] += 1

    def download(self) -> None:
        self.downloads += 1
        self.waits += 1
        self.by_name["download"] += 1

    def ran(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Counts one operation of torch's dispatcher. `name`: without the underscore of an operation in place."""
        if name in EMPTY or (name in VIEWS and not func._schema.is_mutable):
            return
        if name in WAITS or _finds_ones(name, args):
            self.waits += 1
            self.by_name["wait: " + name] += 1
        if name in ("_local_scalar_dense", "is_nonzero"):
            return
        self.launches += 1
        self.by_name[name] += 1
        given = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("index", "gather", "index_select"):  # reads no more of its source than it returns
            self.read += _nbytes(*given[1:]) + _nbytes(out)
        elif name in ("index_put", "scatter"):
            self.read += _nbytes(*given[1:])
        elif name not in ("fill", "zero"):
            self.read += _nbytes(*(given[1:] if name == "copy" else given))
        if name in ("index_put", "scatter"):
            self.written += sum(x.numel() for x in given[1:2]) * given[0].element_size()
        else:
            self.written += _nbytes(*(x for x in leaves_of(out) if isinstance(x, torch.Tensor)))


COUNTS = Counts()


def leaves_of(x: Any) -> list[Any]:
    """Returns what these nested tuples, lists and dicts hold. (torch.utils._pytree does it, several times slower.)"""
    if isinstance(x, (tuple, list)):
        return [leaf for each in x for leaf in leaves_of(each)]
    return [leaf for each in x.values() for leaf in leaves_of(each)] if isinstance(x, dict) else [x]


def changed(change: Callable[[Any], Any], x: Any) -> Any:
    """Returns nested tuples, lists and dicts with what they hold changed."""
    if isinstance(x, (tuple, list)):
        found = [changed(change, each) for each in x]
        return found if isinstance(x, list) else tuple(found) if type(x) is tuple else type(x)(found)
    return {key: changed(change, each) for key, each in x.items()} if isinstance(x, dict) else change(x)


def _finds_ones(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose ones have to be counted. One value for all of them is written without counting."""
    if name not in ("index", "index_put"):
        return False
    masks = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return masks and not (name == "index_put" and args[2].numel() == 1)


def _nbytes(*tensors: torch.Tensor) -> int:
    """Returns the bytes of these tensors; what an expanded tensor repeats counts once."""
    total = 0
    for x in tensors:
        size = x.element_size()
        for n, step in zip(x.shape, x.stride(), strict=True):
            size *= n if step else min(n, 1)
        total += size
    return total


class DeviceTensor(torch.Tensor):
    """Says that it is on cuda:0. held: its elements, on the host. gradient: the last `.grad` that it gave out or got."""

    held: torch.Tensor
    gradient: DeviceTensor | None = None

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} reached the shell of a DeviceTensor, which holds nothing: _call has to take it")

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.held})"

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return DeviceTensor(self.held.clone())


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        COUNTS.ran(name.rstrip("_"), func, args, kwargs, out)
        return out


class _Making(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _asked(False):
            return _call(func, args, kwargs or {})


class _Thread(threading.local):
    """active: whether a `_Making` is asked in this thread. Torch does not ask it while it answers, for example with a backward pass."""

    active = False


_thread = _Thread()


@contextmanager
def _asked(active: bool) -> Iterator[None]:
    before, _thread.active = _thread.active, active
    try:
        yield
    finally:
        _thread.active = before


@contextmanager
def pretended() -> Iterator[None]:
    """Inside of this, `device="cuda:0"` makes tensors on the pretended device."""
    if _thread.active:
        yield
        return
    with _Making(), _asked(True):
        yield


def _is_device(x: Any) -> bool:
    return isinstance(x, (torch.device, str)) and str(x).startswith("cuda")


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a torch function with what the tensors hold, and returns tensors on the device where CUDA's would be."""
    name, leaves = getattr(func, "__name__", ""), leaves_of((args, kwargs))
    on_device = [x for x in leaves if isinstance(x, DeviceTensor)]
    to_device = _is_device(kwargs.get("device")) or (name == "to" and any(map(_is_device, args[1:])))
    if not on_device and not to_device:
        return func(*args, **kwargs)
    if name == "__get__":
        what = func.__self__.__name__
        if what in ("device", "is_cuda", "is_cpu"):
            return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[what]
        if what == "grad":
            return _gradient_of(args[0])
    if name == "__set__" and func.__self__.__name__ == "grad":
        args[0].gradient = args[1]
    if name == "register_post_accumulate_grad_hook":
        return func(args[0].held, _with(args[0], args[1]))
    if name in HOST_ONLY:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    on_host = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    if name == "cpu" or (name == "to" and any(x in ("cpu", torch.device("cpu")) for x in (*args[1:], kwargs.get("device")) if _names(x))):
        COUNTS.download()
        return args[0].held.clone()
    if name == "tolist":  # copies to the host, without an operation of the dispatcher
        COUNTS.download()
    if name == "to" and not on_device:
        COUNTS.upload(not kwargs.get("non_blocking"))
        return _moved(args, kwargs)
    if name in ("copy_", "__setitem__") and on_host and on_device:
        return _copied(func, name, args, kwargs)
    if on_host and on_device and any(x.dim() for x in on_host):
        shapes = [tuple(x.shape) for x in on_host]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu (tensors of shapes {shapes})")
    if name == "tensor":  # made on the host, and copied
        COUNTS.upload(True)
        return DeviceTensor(func(*args, **{**kwargs, "device": "cpu"}))
    mine = {id(x.held): x for x in on_device}
    args, kwargs = changed(_inner, args), changed(_inner, kwargs)
    with nullcontext() if name in BACKWARD else _Counting():
        out = func(*args, **kwargs)
    return changed(lambda x: mine[id(x)] if id(x) in mine else DeviceTensor(x) if isinstance(x, torch.Tensor) else x, out)


def _gradient_of(x: DeviceTensor) -> DeviceTensor | None:
    """Returns its gradient, the same object as before if it is the same gradient, as torch does."""
    held = x.held.grad
    if held is None or x.gradient is None or x.gradient.held is not held:
        x.gradient = None if held is None else DeviceTensor(held)
    return x.gradient


def _with(x: DeviceTensor, hook: Callable[[Any], None]) -> Callable[[torch.Tensor], None]:
    """Returns a hook for what the tensor holds, which calls `hook` with the tensor."""
    this = weakref.ref(x)
    return lambda _: hook(this())


def _names(x: Any) -> bool:
    return isinstance(x, (torch.device, str))


def _inner(x: Any) -> Any:
    """Returns what the host computes with in place of this argument."""
    if isinstance(x, DeviceTensor):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")) else x


def _moved(args: Any, kwargs: dict[str, Any]) -> DeviceTensor:
    """Returns a copy of a tensor on the host, as `to` was asked for it."""
    others = [x for x in (*args[1:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
    return DeviceTensor(args[0].to(*others).clone())


def _copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copies between the host and the device."""
    if isinstance(args[0], DeviceTensor):
        COUNTS.upload(not kwargs.get("non_blocking"))
    else:
        COUNTS.download()
    func(*changed(_inner, args), **kwargs)
    return args[0] if name == "copy_" else None


def _run_pretended(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with pretended():
            return method(*args, **kwargs)

    return run


class PretendedOps(TorchOps):
    """Runs TorchOps for tensors of the pretended device, each operation inside of `pretended()`."""

    def __init__(self) -> None:
        super().__init__(DEVICE)


for _name in dir(TorchOps):
    if callable(getattr(TorchOps, _name)) and not _name.startswith("__"):
        setattr(PretendedOps, _name, _run_pretended(getattr(TorchOps, _name)))
