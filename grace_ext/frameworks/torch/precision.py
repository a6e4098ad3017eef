"""Keeps the products of matrices on GPUs exact to float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Makes products of float32 matrices on GPUs exact to float32 inside of this. TF32, which users may allow elsewhere, rounds to 10 bits,
    and GPUs that do not have it would give other gradients."""
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    if before != exact:
        setattr(matmul, name, exact)
    try:
        yield
    finally:
        if before != exact:
            setattr(matmul, name, before)
