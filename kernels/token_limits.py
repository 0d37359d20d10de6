"""Which tokens of a row of logits top-k and top-p leave, without a sort.

Both are a threshold on the logit: the greatest one above which, itself included, lie k tokens, or a mass of p. It is
found exactly, by bisection on the logits' order as integers, where each pass shrinks the bracket to logits that
occur. A pass reads the row; there are at most as many as a logit has bits. Of equal logits at the threshold top-k
leaves all, top-p the first, which costs one more pass. Nothing of size V is written.

What it costs: top-k and top-p read the row again in every pass of their bisection, 11 to 14 times for a top-k of 50
and 14 to 23 for a top-p of 0.9. Counted by passes a draw then takes 5 to 9 times as long as a plain one on CUDA; that
has not been timed.

A row is the tuple (pointer, vocabulary, inner, outer, forbidden_ptr, num_forbidden).
"""

import triton
import triton.language as tl
from fastppo.kernels.scaling import load_scaled


@triton.jit
def order_key(z):
    """Return integers in the order of floating point numbers, -0.0 and 0.0 being one."""
    z = tl.where(z == 0, 0.0, z)
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = z.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key):
    """Return the floating point number of a key."""
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_allowed(row, columns, HAS_SOFTCAP: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, ACC: tl.constexpr):
    """Return the scaled logits of some columns, -inf for those that may not be drawn."""
    row_ptr, vocabulary, inner, outer, forbidden_ptr, num_forbidden = row
    _, z = load_scaled((row_ptr, vocabulary, inner, outer), columns, HAS_SOFTCAP, ACC)
    if HAS_FORBIDDEN:
        for i in range(num_forbidden):
            z = tl.where(columns == tl.load(forbidden_ptr + i), float("-inf"), z)
    return z


@triton.jit
def measure_above(
    row,
    threshold,
    largest,
    lowest,
    IS_MASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the measure of the tokens of key >= threshold, the least such key, and the greatest below the threshold.

    The measure is their number, or their Σ exp(z - largest). It is summed in one order, so that, rounded as it is, it
    never grows with the threshold. Where there is no key to return, it is that of `largest` or `lowest`.
    """
    measure = tl.zeros((), ACC)
    least, greatest = order_key(largest), lowest
    for start in range(0, row[1], TILE):
        columns = start + tl.arange(0, TILE)
        z = load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)
        key = order_key(z)
        is_above = key >= threshold
        if IS_MASS:
            measure += tl.sum(tl.where(is_above, tl.exp(z - largest), 0.0), axis=0)
        else:
            measure += tl.sum(tl.where(is_above & (columns < row[1]), 1.0, 0.0).to(ACC), axis=0)
        least = tl.minimum(least, tl.min(tl.where(is_above, key, least), axis=0))
        greatest = tl.maximum(greatest, tl.max(tl.where(is_above, greatest, key), axis=0))
    return measure, least, greatest


@triton.jit
def find_threshold(
    row,
    needed,
    low,
    largest,
    IS_MASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the greatest key of a logit, from low to that of the largest, above which, itself included, lies `needed`.

    The measure above low is enough.
    """
    high = order_key(largest)
    while low < high:
        # Half-way, rounded up, without overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        measure, least, greatest = measure_above(
            row, middle, largest, low, IS_MASS, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE
        )
        is_enough = measure >= needed
        low, high = tl.where(is_enough, least, low), tl.where(is_enough, high, greatest)
    return low


@triton.jit
def nth_tie(
    row,
    threshold,
    quota,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the column of the quota-th token whose key is the threshold, or of the last one if there are fewer."""
    seen, last = tl.zeros((), ACC), tl.full((), -1, tl.int32)
    for start in range(0, row[1], TILE):
        columns = start + tl.arange(0, TILE)
        is_tie = order_key(load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)) == threshold
        rank = seen + tl.cumsum(is_tie.to(tl.int32), axis=0).to(ACC)
        last = tl.maximum(last, tl.max(tl.where(is_tie & (rank <= quota), columns, -1), axis=0))
        seen += tl.sum(is_tie.to(tl.int32), axis=0).to(ACC)
    return last


@triton.jit
def find_limits(
    row,
    largest,
    top_k,
    top_p,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return (key, column): top-k, then top-p, leave what is above the key, and its ties up to that column."""
    threshold = order_key(tl.full((), float("-inf"), ACC))
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if HAS_TOP_K:
        needed = top_k.to(ACC)
        threshold = find_threshold(row, needed, threshold, largest, False, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
    if HAS_TOP_P:
        total, _, _ = measure_above(row, threshold, largest, threshold, True, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
        needed = top_p * total
        threshold = find_threshold(row, needed, threshold, largest, True, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
        above, _, _ = measure_above(row, threshold + 1, largest, threshold, True, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
        # Of equals the first are taken, as long as the mass before one falls short.
        quota = tl.maximum(tl.ceil((needed - above) / tl.exp(from_order_key(threshold) - largest)), 1.0)
        last = nth_tie(row, threshold, quota, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
    return threshold, last
