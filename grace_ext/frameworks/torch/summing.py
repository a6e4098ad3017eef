"""Adds up floats on a device in the order of arrays/sums.py, so that all libraries get the same bits."""

from __future__ import annotations

import numpy as np
import torch

from ...arrays import sums
from .deferring import DeferringOps


class SummingOps(DeferringOps):
    """The part of TorchOps that sums."""

    def block_norms(self, x: torch.Tensor, block: int, order: float) -> torch.Tensor:
        if not len(x):
            return self.zeros(0, "float64")
        rows = self._rows(x, min(block, len(x)))
        if order == np.inf:
            return rows.abs().amax(dim=1)
        found = sums.row_sums(rows.abs_() if order == 1 else rows.square_(), add=self._in_order)
        return found if order == 1 else found.sqrt()

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `sums.in_order`: running sums down the columns of a matrix are made in order, those of a vector may be made in a tree."""
        if rows.shape[1] == 1:
            return rows[:, 0]
        columns = rows.T if len(rows) > 1 else torch.cat([rows, torch.zeros_like(rows)]).T
        return torch.cumsum(columns.contiguous(), 0)[-1, : len(rows)]

    def _rows(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """Returns `sums.in_blocks`; without zeros first, if nothing is left of them."""
        if len(x) % block or (block > sums.PIECE and block % sums.PIECE):
            return sums.in_blocks(self, x, block)
        return x.to(torch.float64, copy=True).reshape(-1, block)

    def sums_of_each(self, x: torch.Tensor, ends: np.ndarray) -> torch.Tensor:
        how, padded = sums.pieces_of(tuple(ends.tolist())), []
        for here in how.long:
            padded += [x[here], x.new_zeros(-(here.stop - here.start) % sums.PIECE)]
        with_zero = torch.cat([x, x.new_zeros(1)])  # at the end, where -1 is
        short = with_zero[self.upload_once(how.places)].reshape(-1)
        rows = torch.cat([*padded, short]).to(torch.float64).abs_().reshape(-1, sums.PIECE)
        each = self.zeros(len(ends) * how.most, "float64")
        each[self.upload_once(how.at)] = sums.fold(rows)
        return self._in_order(each.reshape(len(ends), -1))

    def sums_of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return sums.row_sums(sums.filled(self, rows), add=self._in_order)

    def total(self, x: torch.Tensor) -> float:
        return float(sums.row_sums(self._rows(x, len(x)), add=self._in_order)[0]) if len(x) else 0.0
