"""The array protocol for torch: `HostOps` for CPU tensors, through numpy without copies; `TorchOps` for any device, in torch operations.

Both give the same bytes. On a CPU the numpy form is faster, and only it has compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ...arrays.numpy import LARGEST, NumpyOps, saturated
from ...parts import rng
from ...parts.field import HALVES, INTEGERS
from ...parts.ops import Flag
from ...parts.tensor import TensorSpec
from .precision import full_precision
from .summing import SummingOps

MASK32 = 0xFFFFFFFF
#: By width: integers of which a code that is no negative number has the right bits.
NARROW = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def describe(tensor: Any) -> tuple[tuple[int, ...], str]:
    """Returns (shape, dtype name) of a torch tensor, or of anything that numpy accepts."""
    if isinstance(tensor, torch.Tensor):
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return NumpyOps.describe(NumpyOps(), tensor)


def flat(tensor: Any) -> torch.Tensor:
    """Returns the elements as a flat contiguous tensor: float64 stays, everything else becomes float32."""
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.from_numpy(np.ascontiguousarray(NumpyOps().ingest(tensor)))
    tensor = tensor.detach()
    return (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)).reshape(-1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's elements as flat bytes, without a copy if it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() < 2:  # contiguous whatever its stride is, which `view` does not accept
        flat = flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8)


class HostOps(NumpyOps):
    """Operations for torch CPU tensors: the user's tensors are torch's, the arrays inside are numpy's."""

    device = torch.device("cpu")

    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        return describe(tensor)

    def ingest(self, tensor: Any) -> np.ndarray:
        return flat(tensor).numpy()

    def emit(self, array: np.ndarray, spec: TensorSpec) -> torch.Tensor:
        if spec.dtype in HALVES:
            return torch.from_numpy(self.to_bytes(array, spec.dtype)).view(getattr(torch, spec.dtype)).reshape(spec.shape)
        # Received data may be a read-only or shared view; the user always gets memory of their own that is writable.
        array = saturated(array, spec.dtype)
        owned = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
        return torch.from_numpy(owned).to(getattr(torch, spec.dtype)).reshape(spec.shape)

    def overwrite(self, tensor: Any, array: np.ndarray, spec: TensorSpec) -> bool:
        if not (array.ctypes.data == tensor.data_ptr() and spec.dtype == "float32" and tensor.is_contiguous()):
            tensor.detach().copy_(self.emit(array, spec))
        return True

    def as_torch(self, array: np.ndarray) -> torch.Tensor:
        """Returns the array as a tensor that shares its memory (a copy if the array is read-only), for a transport."""
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def from_torch(self, tensor: torch.Tensor) -> np.ndarray:
        """Returns the tensor as an array that shares its memory: the inverse of `as_torch`."""
        return tensor.numpy()


class TorchOps(SummingOps):
    """Operations for torch tensors on one device, by torch operations only."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        # Before 2.7 torch has nonzero_static for CPUs only.
        self._static = self.device.type == "cpu" or (self.device.type == "cuda" and VERSION >= (2, 7))
        self._uploaded: dict[int, tuple[np.ndarray, torch.Tensor]] = {}  # by the array's identity
        self._required = []

    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        return describe(tensor)

    def ingest(self, tensor: Any) -> torch.Tensor:
        return flat(tensor).to(self.device)

    def emit(self, array: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        return self._narrowed(array, spec.dtype).reshape(spec.shape)

    def overwrite(self, tensor: torch.Tensor, array: torch.Tensor, spec: TensorSpec) -> bool:
        tensor.detach().copy_(self.emit(array, spec))
        return True

    def overwrite_all(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if pairs:
            torch._foreach_copy_([tensor.detach() for tensor, _ in pairs], [array for _, array in pairs])

    def as_torch(self, array: torch.Tensor) -> torch.Tensor:
        return array

    def from_torch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def zeros(self, size: int, dtype: str = "float32") -> torch.Tensor:
        return torch.zeros(size, dtype=getattr(torch, dtype), device=self.device)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        # CUDA copies pageable memory to a buffer of its own before it returns, so that nobody has to wait. Other devices do not promise it.
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def upload_once(self, array: np.ndarray) -> torch.Tensor:
        if id(array) not in self._uploaded:
            self._uploaded[id(array)] = array, self.upload(array)
        return self._uploaded[id(array)][1]

    def host(self, array: torch.Tensor) -> np.ndarray:
        return array.cpu().numpy()

    def concat(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(arrays))

    def full_nan(self, size: int) -> torch.Tensor:
        return torch.full((size,), float("nan"), device=self.device)

    def cast(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        return x.to(getattr(torch, dtype))

    def saturated(self, x: torch.Tensor) -> torch.Tensor:
        if self.defers and x.dtype == torch.float32:
            return x.clamp_(-LARGEST["float32"], LARGEST["float32"])  # NaN stays NaN
        return super().saturated(x)

    def to_bytes(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        return as_bytes(x.to(getattr(torch, dtype)) if dtype in INTEGERS else self._narrowed(x, dtype))

    def _narrowed(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        """Returns x in this dtype, rounded once to nearest even. Finite values saturate; Inf and NaN stay."""
        largest = LARGEST[dtype]
        if largest < LARGEST[str(x.dtype).removeprefix("torch.")]:
            x = torch.where(x.isfinite(), x.clamp(-largest, largest), x)
        if dtype in HALVES and x.dtype == torch.float64:
            x = self.to_odd(x)  # torch rounds to float32 first
        return x.to(getattr(torch, dtype))

    def from_bytes(self, data: torch.Tensor, dtype: str) -> torch.Tensor:
        if data.storage_offset() % 8 or not data.is_contiguous():
            data = data.clone()
        x = data.view(getattr(torch, dtype))
        if dtype in INTEGERS:
            return x.to(torch.int64)
        return x if dtype in ("float32", "float64") else x.to(torch.float32)

    def float_bits(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & MASK32

    def bits_float(self, bits: torch.Tensor) -> torch.Tensor:
        return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)

    def as_int(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int64)

    def all_finite(self, x: torch.Tensor) -> Flag:
        if not x.numel():
            return True
        low, high = torch.aminmax(x)  # NaN if there is one; one pass, isfinite makes four
        finite = (low > -math.inf) & (high < math.inf)
        return finite if self.defers else bool(finite)

    def any_nonzero(self, x: torch.Tensor) -> bool:
        return bool((x != 0).any())

    def top_k(self, x: torch.Tensor, k: int) -> torch.Tensor:
        if k >= len(x):
            return self.arange(len(x))
        magnitude = x.abs()
        smallest = torch.topk(magnitude, k, sorted=False).values.min()
        keep, equal = magnitude > smallest, magnitude == smallest
        keep |= equal & (torch.cumsum(equal, 0, dtype=torch.int32) <= k - keep.sum())
        return self._ones(keep, k)

    def largest_each(self, x: torch.Tensor, ends: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        if not self.defers or x.dtype != torch.float32:
            return super().largest_each(x, ends, counts)
        # One sort of all: by tensor, then by magnitude, the largest first; a stable sort keeps equals in order.
        sizes, taken = np.diff(ends, prepend=0), np.cumsum(counts)
        keys = (self.owners(ends, len(x)) << 32) - (x.view(torch.int32) & 0x7FFFFFFF)
        order = torch.sort(keys, stable=True).indices
        shift = self.upload((ends - sizes) - (taken - counts))[self.owners(taken, int(taken[-1]))]
        return torch.sort(order[self.arange(len(shift)) + shift]).values

    def _ones(self, mask: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the positions where the mask holds, of which there are `count`; so the host need not wait for their number."""
        if self._static:
            return torch.nonzero_static(mask, size=count).reshape(-1)
        return torch.nonzero(mask).reshape(-1)

    def top_k_each(self, x: torch.Tensor, block: int, k: int) -> torch.Tensor:
        magnitude = x.abs().reshape(-1, block)
        smallest = torch.topk(magnitude, k, dim=1).values[:, -1:]
        keep, equal = magnitude > smallest, magnitude == smallest
        keep |= equal & (torch.cumsum(equal, 1) <= k - keep.sum(dim=1, keepdim=True))
        return self._ones(keep.reshape(-1), k * len(keep))

    def at_least(self, x: torch.Tensor, threshold: float) -> torch.Tensor:
        return torch.nonzero((x.abs() >= float(np.float32(threshold))) & (x != 0)).reshape(-1)

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with full_precision() if self.device.type == "cuda" else nullcontext():
            return a @ b

    def largest(self, x: torch.Tensor) -> float:
        return float(x.abs().max()) if len(x) else 0.0

    def where(self, mask: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        return torch.where(mask, a, b)

    def positions(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(mask).reshape(-1)

    def cumsum(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 0)

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x).values

    def search(self, edges: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.upload(edges.astype(np.float32)), x, right=True)

    def rank_among(self, ascending: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(ascending, x, right=True)

    def sums_by_code(self, codes: torch.Tensor, x: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        # On the host: other devices add in any order, which differs from call to call.
        return NumpyOps().sums_by_code(self.host(codes), self.host(x), count)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone() if isinstance(x, torch.Tensor) else self.upload(np.array(x))

    def sign(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x)

    def log(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float64).log()

    def spread(self, per_block: Any, block: int, size: int, dtype: str = "float32") -> torch.Tensor:
        values = self.cast(self.upload(per_block) if isinstance(per_block, np.ndarray) else per_block, dtype)
        spread = values[:, None].expand(-1, min(block, size)).clone(memory_format=torch.contiguous_format)
        return spread.reshape(-1)[:size]

    def number(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def floor(self, x: torch.Tensor) -> torch.Tensor:
        return torch.floor(x)

    def rint(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    def transpose(self, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return x.permute(*axes).contiguous()

    def random_words(self, key: rng.Key, count: int) -> torch.Tensor:
        # The words are int64 kept below 2**32, because torch has no unsigned 32-bit arithmetic.
        x = (torch.arange(count, device=self.device) + key[0]) & MASK32
        return self._mix(self._mix(x) ^ key[1])

    def drawn(self, chances: torch.Tensor, key: rng.Key) -> torch.Tensor:
        if not (self.defers and self._static and len(chances)):
            return super().drawn(chances, key)
        expected, draws = chances * 2.0**24, (self.random_words(key, len(chances)) >> 8).to(torch.float32)
        holds = draws < expected
        # One draw of 2**24 is a tie: that there are more than these places for them has a chance below 1e-60.
        found = torch.nonzero_static(holds & (draws + 1 > expected), size=min(len(chances), 64 + (len(chances) >> 18)), fill_value=-1)
        tied, first = found.reshape(-1), found.reshape(-1)[:1]
        # Places that are not needed repeat the first tie; if there is none, all write what is there.
        at = torch.where(tied < 0, first.clamp(min=0), tied)
        settled = self._settled(key, at, expected[at].to(torch.float64) - draws[at].to(torch.float64))
        holds[at] = torch.where(first < 0, holds[at], settled)
        return holds

    def _settled(self, key: rng.Key, at: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
        """Returns `rng.settled`, by two words each, which leave one draw in 2**88 undecided."""
        holds, undecided, rest = torch.zeros_like(at, dtype=torch.bool), torch.ones_like(at, dtype=torch.bool), chances
        for turn in range(1, 3):
            rest = rest * 2.0**32
            whole = rest.floor()
            words = self._mix(self._mix((at + key[0]) & MASK32) ^ (key[1] ^ (turn * rng.SETTLING & MASK32)))
            holds |= undecided & (words < whole)
            undecided &= words == whole
            rest = rest - whole
        return holds

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        x = x ^ (x >> 16)
        x = (x * rng.MULTIPLIER_1) & MASK32
        x = x ^ (x >> 15)
        x = (x * rng.MULTIPLIER_2) & MASK32
        return x ^ (x >> 16)

    def pack(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        if width in (8, 16, 32):
            return as_bytes(codes.to(NARROW[width]))
        if width < 8 and 8 % width == 0:
            return self._joined(codes.to(torch.uint8), width)
        bits = codes[:, None] >> torch.arange(width, device=self.device)
        return self._joined((bits & 1).to(torch.uint8).reshape(-1), 1)

    def _joined(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        """Packs uint8 codes whose width divides 8: each byte has a whole number of them."""
        each = 8 // width
        padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
        return (padded << self._shifts(width)).sum(dim=1, dtype=torch.uint8)

    def _shifts(self, width: int) -> torch.Tensor:
        """Returns where the codes of one byte begin in it, in bits."""
        return torch.arange(0, 8, width, dtype=torch.uint8, device=self.device)

    def _parted(self, data: torch.Tensor, width: int) -> torch.Tensor:
        """Inverts `_joined`; the padding is there, too."""
        return ((data[:, None] >> self._shifts(width)) & ((1 << width) - 1)).reshape(-1)

    def unpack(self, data: torch.Tensor, width: int, count: int) -> torch.Tensor:
        if width == 8:
            return data[:count].to(torch.int64)
        if width < 8 and 8 % width == 0:
            return self._parted(data, width)[:count].to(torch.int64)
        bits = self._parted(data, 1)[: count * width].reshape(count, width).to(torch.int64)
        return (bits << torch.arange(width, device=self.device)).sum(dim=1)

    def pack_signs(self, x: torch.Tensor) -> torch.Tensor:
        return self._joined((x >= 0).view(torch.uint8), 1)

    def unpack_signs(self, data: torch.Tensor, count: int) -> torch.Tensor:
        return self._parted(data, 1)[:count].to(torch.float32) * 2 - 1

    def set_bits(self, positions: torch.Tensor, bits: int) -> torch.Tensor:
        marked = torch.zeros(bits, dtype=torch.uint8, device=self.device)
        marked[positions] = 1
        return self._joined(marked, 1)

    def bit_positions(self, data: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(self._parted(data, 1)).reshape(-1)

    def ones_of(self, data: torch.Tensor, count: int) -> tuple[torch.Tensor, Flag]:
        if not (self.defers and self._static):
            return super().ones_of(data, count)
        bits = self._parted(data, 1)
        return self._ones(bits, count), bits.sum(dtype=torch.int64) == count

    def arange(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.device)
