"""Implements the array protocol for torch tensors on a GPU, with Triton kernels where these move or launch less than torch does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ....arrays.sums import PIECE
from ....parts.ops import Feedback, Flag
from ....parts.rng import Key
from ..ops import TorchOps
from . import kernels

#: Elements per program.
BLOCK = 1024
#: Elements that a tensor may have: int32 counts the programs, and the elements of a digit.
MOST = 2**31 - BLOCK
#: The digits of a magnitude's 31 bits for the search of `top_k`: (the place of the lowest bit, how many bits).
DIGITS = ((20, 11), (10, 10), (0, 10))
#: Blocks whose pieces one program adds.
LANES = 32
#: A fused multiply-add rounds once where the plain form rounds twice.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


class TritonOps(TorchOps):
    """Equals TorchOps bit for bit. What has no kernel, and what kernels do not take, are TorchOps' operations."""

    def _run(self, kernel: Any, programs: int, *args: Any, **sizes: Any) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **sizes, **OPTIONS)

    def _new(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    # --- sums -------------------------------------------------------------------------------------------------------
    def sum_up(self, feedback: Feedback, grad: torch.Tensor) -> torch.Tensor:
        residual = feedback.residual
        if residual is None or not (_takes(grad) and _takes(residual)):
            return super().sum_up(feedback, grad)
        total, factors = torch.empty_like(grad), (float(np.float32(feedback.beta)), float(np.float32(feedback.gamma)))
        self._run(kernels.add_scaled, _blocks(len(grad)), residual, grad, total, *factors, len(grad), BLOCK=BLOCK)
        return total

    def block_norms(self, x: torch.Tensor, block: int, order: float) -> torch.Tensor:
        if order == np.inf or not _takes(x):
            return super().block_norms(x, block, order)
        found = self._block_sums(x, min(block, len(x)), order == 2)
        return found.sqrt() if order == 2 else found

    def _block_sums(self, x: torch.Tensor, block: int, square: bool) -> torch.Tensor:
        """Returns float64: the sum of each block's magnitudes (or squares), in the order of arrays/sums.py."""
        number, pieces, width = -(-len(x) // block), -(-block // PIECE), min(block, PIECE)
        steps = (width - 1).bit_length()
        sums, sizes = self._new(number * pieces, torch.float64), {"PIECE": PIECE, "SIZE": 1 << steps, "STEPS": steps}
        self._run(kernels.piece_sums, len(sums), x, sums, len(x), block, pieces, width, SQUARE=square, **sizes)
        if pieces == 1:
            return sums
        totals = self._new(number, torch.float64)
        self._run(kernels.add_pieces, -(-number // LANES), sums, totals, number, pieces, LANES=LANES)
        return totals

    # --- selection --------------------------------------------------------------------------------------------------
    def top_k(self, x: torch.Tensor, k: int) -> torch.Tensor:
        if not _takes(x) or not 0 < k < len(x):
            return super().top_k(x, k)
        kth, need = self.zeros(1, "int32"), torch.full((1,), k, dtype=torch.int32, device=self.device)
        counts = self.zeros(len(DIGITS) << 11, "int32").reshape(len(DIGITS), -1)
        for number, (shift, bits) in enumerate(DIGITS):
            digit = {"BITS": bits, "FIRST": number == 0}
            self._run(kernels.histogram, _blocks(len(x)), x, counts[number], kth, len(x), SHIFT=shift, BLOCK=BLOCK, **digit)
            self._run(kernels.pick_digit, 1, counts[number], kth, need, **digit)
        return self._chosen(x, kth, need, k, nans=True)

    def at_least(self, x: torch.Tensor, threshold: float) -> torch.Tensor:
        if not _takes(x) or not threshold >= 0:
            return super().at_least(x, threshold)
        below = max(int(np.float32(threshold).view(np.uint32)), 1) - 1  # zeros are never found
        return self._chosen(x, torch.full((1,), below, dtype=torch.int32, device=self.device), self.zeros(1, "int32"), None, nans=False)

    def _chosen(self, x: torch.Tensor, kth: torch.Tensor, need: torch.Tensor, count: int | None, *, nans: bool) -> torch.Tensor:
        """Returns the positions of magnitudes above `kth` and of `need` of its equals. count: how many, if that is known; else the host
        waits for it."""
        programs, sizes = _blocks(len(x)), {"NANS": nans, "BLOCK": BLOCK}
        found = self._new(2 * programs, torch.int32).reshape(2, programs)
        self._run(kernels.count_chosen, programs, x, kth, *found, len(x), **sizes)
        ends = torch.cumsum(found, 1)
        positions = self._new(int(ends[0, -1]) if count is None else count, torch.int64)
        self._run(kernels.write_chosen, programs, x, kth, need, *ends, positions, len(x), **sizes)
        return positions

    # --- random numbers ---------------------------------------------------------------------------------------------
    def random_words(self, key: Key, count: int) -> torch.Tensor:
        out = self._new(count, torch.int64)
        if count:
            self._run(kernels.random_words, _blocks(count), out, int(key[0]), int(key[1]), count, BLOCK=BLOCK)
        return out

    def round_randomly(self, x: torch.Tensor, scale: torch.Tensor, levels: int, key: Key) -> torch.Tensor:
        if not (_takes(x) and _takes(scale) and len(x) == len(scale) and levels < 2**30):
            return super().round_randomly(x, scale, levels, key)
        codes, words = self._new(len(x), torch.int64), (int(key[0]), int(key[1]))
        self._run(kernels.round_randomly, _blocks(len(x)), x, scale, codes, int(levels), *words, len(x), BLOCK=BLOCK)
        return codes

    # --- bits -------------------------------------------------------------------------------------------------------
    def pack(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        if width == 8 or not len(codes):
            return super().pack(codes, width)
        out = self._new((len(codes) * width + 7) // 8, torch.uint8)
        self._run(kernels.pack_codes, _blocks(len(out)), codes.to(torch.int64).contiguous(), out, len(codes), WIDTH=width, BLOCK=BLOCK)
        return out

    def unpack(self, data: torch.Tensor, width: int, count: int) -> torch.Tensor:
        if width == 8 or not 0 < count * width <= 8 * len(data):
            return super().unpack(data, width, count)
        codes, data = self._new(count, torch.int64), data.contiguous()
        self._run(kernels.unpack_codes, _blocks(count), data, codes, len(data), count, WIDTH=width, BLOCK=BLOCK)
        return codes

    def pack_signs(self, x: torch.Tensor) -> torch.Tensor:
        if not _takes(x):
            return super().pack_signs(x)
        out = self._new((len(x) + 7) // 8, torch.uint8)
        self._run(kernels.pack_signs, _blocks(len(x)), x, out, len(x), BLOCK=BLOCK)
        return out

    def unpack_signs(self, data: torch.Tensor, count: int) -> torch.Tensor:
        if not 0 < count <= 8 * len(data):
            return super().unpack_signs(data, count)
        signs = self._new(count, torch.float32)
        self._run(kernels.unpack_signs, _blocks(count), data.contiguous(), signs, count, BLOCK=BLOCK)
        return signs

    def set_bits(self, positions: torch.Tensor, bits: int) -> torch.Tensor:
        out = self.zeros((bits + 31) // 32, "int32")
        if len(positions):
            self._run(kernels.set_bits, _blocks(len(positions)), positions.contiguous(), out, len(positions), BLOCK=BLOCK)
        return out.view(torch.uint8)[: (bits + 7) // 8]

    def bit_positions(self, data: torch.Tensor) -> torch.Tensor:
        return self._ones_of(data, None)[0] if len(data) else super().bit_positions(data)

    def ones_of(self, data: torch.Tensor, count: int) -> tuple[torch.Tensor, Flag]:
        if not (self.defers and len(data)):
            return super().ones_of(data, count)
        positions, found = self._ones_of(data, count)
        return positions, found == count

    def _ones_of(self, data: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the positions of the ones; how many there are). count: the length of the positions, if it is known: further ones are
        left out then, and missing ones are 0. Else the host waits for it."""
        data, bits = data.contiguous(), 8 * len(data)
        counts = self._new(_blocks(bits), torch.int32)
        self._run(kernels.count_bits, len(counts), data, counts, bits, BLOCK=BLOCK)
        ends = torch.cumsum(counts, 0)
        positions = self.zeros(int(ends[-1]) if count is None else count, "int64")
        self._run(kernels.write_bits, len(counts), data, ends, positions, bits, len(positions), BLOCK=BLOCK)
        return positions, ends[-1]


def _blocks(size: int) -> int:
    """Returns how many programs of BLOCK elements there are."""
    return -(-size // BLOCK)


def _takes(x: torch.Tensor) -> bool:
    """Whether kernels for floats take this array."""
    return x.dtype == torch.float32 and x.dim() == 1 and x.is_contiguous() and 0 < len(x) <= MOST
