"""What the jobs of privacy share: noise that several runs draw alike, and the bytes that leave a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from grace_ext.privacy.noise import Noise


@contextmanager
def same_noise(rank: int) -> Iterator[None]:
    """Makes every draw of noise on this rank the same inside."""
    with mock.patch.object(Noise, "normals", lambda self, count: np.random.default_rng(rank).standard_normal(count)):
        yield


def tapped(transport: Any) -> list[bytes]:
    """Returns a list that gets the bytes of every array that this transport is to send from now on."""
    sent, start = [], transport.start

    def tap(collective, name):
        sent.append(bytes(memoryview(collective.array)))
        return start(collective, name)

    transport.start = tap
    return sent


def check_nothing_raw_is_sent(seen: Mapping[tuple[bool, float], list[bytes]]) -> None:
    """Asserts that runs whose raw gradients differ by a factor of 1024 send the same bytes with privacy, and other bytes without.

    seen: what a rank sent, by (whether privacy was asked for, the factor)."""
    drop = [[m for m in seen[True, scale] if b'"spec"' not in m] for scale in (1.0, 1024.0)]  # the agreement counts drivers
    assert len(drop[0]) >= 3 and drop[0] == drop[1]
    assert seen[False, 1.0] != seen[False, 1024.0]
