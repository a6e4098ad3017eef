"""Computes the size of codes of positions, in plain arithmetic for kernels and all other code; and holds sizes that they share."""

from __future__ import annotations


def smallest_elias_fano(k: int, d: int) -> tuple[int, int]:
    """Returns, for k positions of d, 0 < k < d: (the number of low bits that makes the Elias-Fano code smallest, the lowest such number;
    the bytes of that code)."""
    quotient, about = d // k, 0
    while quotient > 1:
        quotient >>= 1
        about += 1
    best, least = 0, 1 << 62
    for low in range(max(0, about - 1), min(31, about + 1) + 1):
        size = (k * low + 7) // 8 + (k + (d - 1 >> low) + 7) // 8
        if size < least:
            best, least = low, size
    return best, least


#: The bits of an infinite float32. Those of finite magnitudes are smaller.
INFINITY = 0x7F800000


#: Elements that stay in the first-level cache while kernels use them again.
L1_PIECE = 2048


#: The most elements of which positions are chosen by sorting a word of each. Of 64 or fewer, a Feistel network has too few functions: some
#: pairs of positions would be likelier than others.
FEW = 256


#: Elements of which a few such pieces stay in the second-level cache together.
L2_PIECE = 16384
