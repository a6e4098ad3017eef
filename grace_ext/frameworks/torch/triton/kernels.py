"""Triton kernels for tensors on a GPU. Each equals the plain torch operations of ../ops.py, and so the kernels of CPUs, bit for bit.

They must be compiled without fused multiply-adds (`enable_fp_fusion=False`), which round once where the plain form rounds twice. No kernel
reads a value on the host. Offsets are int64, because a tensor may have more than 2**31 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- elementwise ------------------------------------------------------------------------------------------------------


@triton.jit
def add_scaled(residual, grad, total, beta, gamma, n, BLOCK: tl.constexpr):
    """Computes total_j = beta residual_j + gamma grad_j."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < n
    sums = beta * tl.load(residual + at, mask=within, other=0.0) + gamma * tl.load(grad + at, mask=within, other=0.0)
    tl.store(total + at, sums, mask=within)


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def words(at, key0, key1):
    """Returns uint32: these words of the stream of parts/rng.py."""
    return mix(mix(at.to(tl.uint32) + key0.to(tl.uint32)) ^ key1.to(tl.uint32))


@triton.jit(do_not_specialize=["key0", "key1"])
def random_words(out, key0, key1, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, words(at, key0, key1).to(tl.int64), mask=at < n)


@triton.jit
def settled(at, undecided, rest, key0, key1):
    """Returns which undecided draws hold, with the chances `rest`; see parts/rng.py. Four words decide every float32."""
    holds = undecided & (at < 0)
    for m in tl.static_range(1, 5):
        rest = tl.where(undecided, rest, 0.0) * 4294967296.0
        whole, more = rest.to(tl.uint32), words(at, key0, key1.to(tl.uint32) ^ ((m * 0x9E3779B9) & 0xFFFFFFFF))
        holds = holds | (undecided & (more < whole))
        rest -= whole.to(tl.float32)
        undecided = undecided & (more == whole) & (rest > 0)
    return holds


@triton.jit(do_not_specialize=["key0", "key1", "levels"])
def round_randomly(x, scale, codes, levels, key0, key1, n, BLOCK: tl.constexpr):
    """Rounds |x_j| scale_j down or up, at random, to at most `levels`, below 2**30.

    Rounds down by int32: `tl.floor` flushes subnormal numbers, and AMD's conversion to int64 has a fused multiply-add."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < n
    scaled = tl.abs(tl.load(x + at, mask=within, other=0.0)) * tl.load(scale + at, mask=within, other=0.0)
    scaled = tl.minimum(scaled, 1073741824.0)
    low = scaled.to(tl.int32)
    expected, draw = (scaled - low.to(tl.float32)) * 16777216.0, (words(at, key0, key1) >> 8).to(tl.float32)
    up = draw < expected
    undecided = up & (draw + 1.0 > expected)
    up = tl.where(undecided, settled(at, undecided, expected - draw, key0, key1), up)
    code = low.to(tl.int64) + up.to(tl.int64)
    tl.store(codes + at, tl.minimum(code, levels.to(tl.int64)), mask=within)


# --- sums, in the order of arrays/sums.py -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["block", "pieces", "width"])
def piece_sums(x, sums, n, block, pieces, width, SQUARE: tl.constexpr, PIECE: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Sums the magnitudes (or squares) of one piece of a block, in float64. A piece has `width` elements, at most SIZE = 2**STEPS.

    The order adds the upper half to the lower half, and so on. Lane t loads the element that such halving, of a width that is no power of
    two, brings to where t would be; the middle element of an odd number has no partner, and an empty lane adds a zero."""
    pid = tl.program_id(0)
    of_block, of_piece = (pid // pieces).to(tl.int64), (pid % pieces).to(tl.int64)  # divided as int32: int64 would go by way of floats
    lane = tl.arange(0, SIZE)
    at, present = tl.zeros((SIZE,), tl.int64), lane >= 0
    for m in tl.static_range(STEPS):
        level = STEPS - m
        at += ((lane >> m) & 1) * ((width + (1 << level) - 1) >> level)
        present = present & (at < ((width + (1 << (level - 1)) - 1) >> (level - 1)))
    if STEPS == 0:
        present = present & (at < width)
    within = of_piece * PIECE + at
    place = of_block * block + within
    values = tl.load(x + place, mask=present & (within < block) & (place < n), other=0.0).to(tl.float64)
    values = values * values if SQUARE else tl.abs(values)
    for m in tl.static_range(STEPS):
        values = tl.sum(tl.reshape(values, (2, SIZE >> (m + 1))), 0)
    tl.store(sums + pid + tl.arange(0, 1), values)


@triton.jit(do_not_specialize=["pieces"])
def add_pieces(sums, totals, number, pieces, LANES: tl.constexpr):
    """Adds the sums of each block's pieces, one after the other."""
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    within = block < number
    total = tl.load(sums + block * pieces, mask=within, other=0.0)
    piece = 1
    while piece < pieces:
        total += tl.load(sums + block * pieces + piece, mask=within, other=0.0)
        piece += 1
    tl.store(totals + block, total, mask=within)


# --- selection: a radix search for the k-th largest magnitude in digits of 11, 10 and 10 bits, and compaction -----------


@triton.jit
def keys(x, at, within):
    """Returns int32: the bits of magnitudes, which have their order."""
    return tl.load(x + at, mask=within, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def histogram(x, counts, kth, n, SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Counts this digit of the magnitudes whose higher digits are `kth`. Integers have the same sum in any order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < n
    key = keys(x, at, within)
    if not FIRST:
        within = within & ((key >> (SHIFT + BITS)) == tl.load(kth))
    tl.atomic_add(counts + ((key >> SHIFT) & ((1 << BITS) - 1)), 1, mask=within)


@triton.jit
def pick_digit(counts, kth, need, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Appends the digit of the k-th largest to `kth`. need[0], which was k, becomes how many are wanted among those that have it."""
    digits = tl.arange(0, 1 << BITS)
    count, k = tl.load(counts + digits), tl.load(need)
    reached = tl.sum(count, 0) - (tl.cumsum(count, 0) - count)  # how many have this digit or a higher one
    digit = tl.max(tl.where(reached >= k, digits, 0), 0)
    tl.store(need, k - tl.sum(tl.where(digits > digit, count, 0), 0))
    if FIRST:
        tl.store(kth, digit)
    else:
        tl.store(kth, (tl.load(kth) << BITS) | digit)


@triton.jit
def chosen(x, at, n, kth, NANS: tl.constexpr):
    """Returns (which magnitudes are above `kth`, which are equal to it)."""
    within = at < n
    key, least = keys(x, at, within), tl.load(kth)
    if not NANS:
        within = within & (key <= 0x7F800000)
    return (key > least) & within, (key == least) & within


@triton.jit
def count_chosen(x, kth, above, equal, n, NANS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    more, same = chosen(x, pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), n, kth, NANS)
    tl.store(above + pid, tl.sum(more.to(tl.int32), 0))
    tl.store(equal + pid, tl.sum(same.to(tl.int32), 0))


@triton.jit
def write_chosen(x, kth, need, above, equal, positions, n, NANS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes, ascending, the positions of all magnitudes above `kth` and of the first need[0] of its equals. `above` and `equal` hold the
    counts of the blocks up to and with each."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    more, same = chosen(x, at, n, kth, NANS)
    room = tl.load(need).to(tl.int64)
    before = tl.load(equal + pid) - tl.sum(same.to(tl.int64), 0)
    take = more | (same & (before + tl.cumsum(same.to(tl.int64), 0) <= room))
    start = tl.load(above + pid) - tl.sum(more.to(tl.int64), 0) + tl.minimum(before, room)
    tl.store(positions + start + tl.cumsum(take.to(tl.int64), 0) - 1, at, mask=take)


# --- bits: eight a byte, the lowest first -----------------------------------------------------------------------------


@triton.jit
def pack_signs(x, out, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    ones = (tl.load(x + at, mask=at < n, other=-1.0) >= 0).to(tl.int32)
    data = tl.sum(tl.reshape(ones, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], 1)
    byte = pid * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(out + byte, data.to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def bits_of(data, at, within):
    """Returns int32: these bits."""
    return (tl.load(data + (at >> 3), mask=within, other=0).to(tl.int32) >> (at & 7).to(tl.int32)) & 1


@triton.jit
def unpack_signs(data, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, (2 * bits_of(data, at, at < n) - 1).to(tl.float32), mask=at < n)


@triton.jit
def set_bits(positions, out, k, BLOCK: tl.constexpr):
    """Sets the bits at these positions in int32 words, which are little-endian."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one = tl.load(positions + at, mask=at < k, other=0)
    tl.atomic_or(out + (one >> 5), (tl.full((BLOCK,), 1, tl.int32) << (one & 31).to(tl.int32)), mask=at < k)


@triton.jit
def count_bits(data, counts, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + pid, tl.sum(bits_of(data, at, at < n), 0))


@triton.jit
def write_bits(data, counts, positions, n, most, BLOCK: tl.constexpr):
    """Writes the positions of the first `most` ones, ascending. `counts` holds the ones of the blocks up to and with each."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ones = bits_of(data, at, at < n).to(tl.int64)
    place = tl.load(counts + pid) - tl.sum(ones, 0) + tl.cumsum(ones, 0) - 1
    tl.store(positions + place, at, mask=(ones == 1) & (place < most))


@triton.jit
def pack_codes(codes, out, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes one byte per lane: eight bits, of the codes to which they belong."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    data = tl.zeros((BLOCK,), tl.int64)
    for j in tl.static_range(8):
        bit = byte * 8 + j
        code = bit // WIDTH
        data |= ((tl.load(codes + code, mask=code < n, other=0) >> (bit - code * WIDTH)) & 1) << j
    tl.store(out + byte, data.to(tl.uint8), mask=byte * 8 < n * WIDTH)


@triton.jit
def unpack_codes(data, codes, nbytes, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Reads one code per lane, from the bytes that hold its bits: five at most."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = at * WIDTH
    word = tl.zeros((BLOCK,), tl.int64)
    for j in tl.static_range((WIDTH + 14) // 8):
        byte = (bit >> 3) + j
        word |= tl.load(data + byte, mask=(at < n) & (byte < nbytes), other=0).to(tl.int64) << (8 * j)
    tl.store(codes + at, (word >> (bit & 7)) & ((1 << WIDTH) - 1), mask=at < n)
