"""The compiled operations that arrays on the host have beside the array protocol, for a part's fast path (compressors/fast_path.py).

arrays/compiled.py has them: loops over contiguous float32 that do in one pass what `Ops` does in several, with the same bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .ops import Feedback, Ops

if TYPE_CHECKING:
    import numpy as np

#: (int64[m]: positions, ascending; float32[m]: the values there)
Found = tuple["np.ndarray", "np.ndarray"]


class Sources(NamedTuple):
    """The arguments of kernels that add the residual themselves.

    x: what is compressed. left: where kernels leave what was not sent, which is the same array, or empty if nobody keeps it."""

    residual: np.ndarray
    grad: np.ndarray
    beta: np.float32
    gamma: np.float32
    x: np.ndarray
    left: np.ndarray

    @property
    def unsent(self) -> np.ndarray | None:
        """`left`, or None if there was no residual."""
        return self.left if self.left is self.x else None


class FastOps(Ops):
    """The array protocol with compiled operations; `ops.kernels` is there. "What is compressed" is the feedback's sum: beta residual +
    gamma gradient. Methods that add it return None if it is not finite, and leave the gradient as zeros if it is spent (Feedback.spent)."""

    @abstractmethod
    def empty(self, size: int, dtype: str = "float32") -> np.ndarray:
        """Returns an array whose values are not set. It is taken back when nobody refers to it after `Ops.recycle`."""

    @abstractmethod
    def halves(self, data: np.ndarray) -> np.ndarray:
        """uint16, of bytes that may start anywhere."""

    # --- adding the residual ------------------------------------------------------------------------------------------
    @abstractmethod
    def compensate(self, feedback: Feedback, grad: np.ndarray) -> np.ndarray | None:
        """Returns what is compressed: a new array, or the gradient itself if there is no residual."""

    @abstractmethod
    def compensate_at(self, feedback: Feedback, grad: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns (what is compressed, if there is a residual with zeros at these positions; the values there)."""

    @abstractmethod
    def compensate_product(self, feedback: Feedback, grad: np.ndarray, q: np.ndarray, rows: int, rank: int) -> Any:
        """Returns (what is compressed, x, in the memory of a gradient that is spent; float32[rows * rank]: the matrix x times Q, which is
        given by rows)."""

    @abstractmethod
    def compensate_signs(self, feedback: Feedback, grad: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns (what is compressed, its signs packed, float64[number]), for a feedback that has a residual. With number 1: the sum of
        magnitudes; with 3: that of the elements below zero, that of the others, and how many are below."""

    @abstractmethod
    def compensate_stats(self, feedback: Feedback, grad: np.ndarray) -> tuple[np.ndarray, float, int, float] | None:
        """Returns (what is compressed, the sum of its magnitudes, how many are not zero, the largest)."""

    @abstractmethod
    def sources(self, feedback: Feedback, grad: np.ndarray) -> Sources:
        """Returns the arguments of kernels that add the residual themselves."""

    @abstractmethod
    def pieces(self, sources: Sources) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (which, what is compressed, where to leave what was not sent) in pieces that are in the cache, the residual added."""

    @abstractmethod
    def measured(self, sources: Sources) -> float | None:
        """Returns the largest magnitude of what is compressed, the residual added."""

    # --- selecting ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def sweep(self, feedback: Feedback, grad: np.ndarray, threshold: float) -> tuple[np.ndarray, Found] | None:
        """Returns, in one pass, (what is compressed, if there is a residual without what is found; where its magnitude reaches the
        threshold, and the values there)."""

    @abstractmethod
    def sweep_for(self, feedback: Feedback, grad: np.ndarray, k: int) -> tuple[np.ndarray, Found | None] | None:
        """As `sweep`, with a threshold that a few more than k elements are likely to reach; looks for nothing if a sort is faster."""

    @abstractmethod
    def take_out(self, feedback: Feedback, x: np.ndarray, threshold: float) -> tuple[np.ndarray, Found] | None:
        """As `sweep`, given x, what is compressed, which is finite."""

    @abstractmethod
    def sample(self, feedback: Feedback, grad: np.ndarray, which: slice) -> np.ndarray:
        """Returns these elements of what is compressed."""

    @abstractmethod
    def magnitudes_above(self, x: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
        """Returns the magnitudes that reach a threshold above zero, in order, and the least of them."""

    @abstractmethod
    def total_above(self, x: np.ndarray, least: float) -> float:
        """Returns the sum of x_j - least, each in float32, in float64."""

    @abstractmethod
    def signs_of(self, x: np.ndarray) -> tuple[np.ndarray, bool] | None:
        """Returns (signs, packed; whether any element is not zero); None if x is not finite."""


def fast(ops: Ops) -> FastOps | None:
    """Returns the operations if they are compiled, else None."""
    return ops if ops.kernels and isinstance(ops, FastOps) else None
