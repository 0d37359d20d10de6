"""Which tokens of a row of logits top-k and top-p leave, without a sort.

Both are a threshold on the logit: the greatest one above which, itself included, lie k tokens, or a mass of p. Of equal
logits at the threshold top-k leaves all, top-p the first.

A sample of the row tells between which two logits the threshold lies. One pass over the row verifies that and gathers
the few logits between them, in which it is found exactly, in registers. A guess that fails, or a bracket that holds
more than can be gathered, costs further passes, each with the bracket that the one before has left. Nothing of size V
is written, and nothing at all for a row that fits into registers.

What it costs: a plain draw reads the row 2 to 3 times (statistics, sum of the weights, and the sum again up to the
token), once more beside forbidden tokens. Top-k, top-p, and top-p after a top-k of up to CAPACITY / 2, add

- one pass to gather, a sample of CAPACITY logits (5% of a row of 151,936), and the gathered, CAPACITY words at most;
- where top-p cuts through equal logits, as in half precision, up to one pass until the last of them that is left.

That makes 3 to 5.2 reads, on the average 1.4 to 1.7 times those of a plain draw. A wrong guess costs two or three
more, seldom: its margin is 4 standard errors. Top-p after a greater top-k gathers anew: one more read. None of this
has been timed on a GPU.

A row is the tuple (pointer, vocabulary, inner, outer, forbidden_ptr, num_forbidden).
"""

import triton
import triton.language as tl
from fastppo.kernels.scaling import load_scaled

# The logits that are sampled, or gathered, at most: 32 registers of a thread's 255, and as many for their weights.
MAX_CAPACITY = 8192
# Sampled logits lie side by side in groups as large as the sectors of memory (32 bytes of bf16).
GROUP = tl.constexpr(16)
MARGIN = tl.constexpr(4.0)


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
def load_sample(row, HAS_SOFTCAP: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, ACC: tl.constexpr, CAPACITY: tl.constexpr):
    """Return the keys of the whole row, filled up with that of -inf, or of groups spread evenly over a longer one."""
    at = tl.arange(0, CAPACITY)
    spread = (at // GROUP) * (row[1] // (CAPACITY // GROUP)) + at % GROUP
    columns = tl.where(row[1] > CAPACITY, spread, at)
    return order_key(load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC))


@triton.jit
def gather(
    row,
    gathered_ptr,
    low,
    high,
    largest,
    IS_MASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write the keys from low to below high in the order of their columns, the first CAPACITY of them.

    Return (number, measure) of these keys, and (measure, mass) of those from high up.
    """
    number = tl.zeros((), tl.int32)
    mass_above, other = tl.zeros((TILE,), ACC), tl.zeros((TILE,), ACC)
    for start in range(0, row[1], TILE):
        columns = start + tl.arange(0, TILE)
        z = load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)
        key, weight = order_key(z), tl.exp(z - largest)
        is_above, is_inside = key >= high, (key >= low) & (key < high)
        mass_above += tl.where(is_above, weight, 0.0)
        other += tl.where(is_inside, weight, 0.0) if IS_MASS else tl.where(is_above, 1.0, 0.0).to(ACC)
        here = tl.sum(is_inside.to(tl.int32), axis=0)
        if here > 0:
            position = number + tl.cumsum(is_inside.to(tl.int32), axis=0) - 1
            tl.store(gathered_ptr + position, key, mask=is_inside & (position < CAPACITY))
        number += here
    mass, sum_of_other = tl.sum(mass_above, axis=0), tl.sum(other, axis=0)
    if IS_MASS:
        return number, sum_of_other, mass, mass
    else:
        return number, number.to(ACC), sum_of_other, mass


@triton.jit
def search(keys, weights, low, high, needed, deviation, spare, largest, IS_MASS: tl.constexpr):
    """Return the greatest key, from low to below high, from which up the weights reach `needed`; low if none.

    What is asked for on top of that is given for tokens of weight 1: a standard deviation, and so many tokens to spare.
    """
    while low + 1 < high:
        # Half-way, without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        goal = needed + deviation + spare
        if IS_MASS:
            weight = tl.exp(from_order_key(middle) - largest)
            goal = needed + deviation * tl.sqrt(weight) + spare * weight
        is_enough = tl.sum(tl.where(keys >= middle, weights, 0.0), axis=0) >= goal
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
    return low


@triton.jit
def guess(
    keys, weights, low, high, needed, tail, share, largest, attempt, IS_MASS: tl.constexpr, CAPACITY: tl.constexpr
):
    """Return the bracket within [low, high) where the threshold probably lies, by a sample of this share.

    As many tokens as `needed` are above it, or the mass `tail` below: of that a sample shows the many small parts well;
    the few large ones it misses. Where the sample does not help, its median decides.
    """
    goal, variance = needed * share, tail * share
    if IS_MASS:
        # No weight below the threshold is greater than the threshold's: that bounds the variance of their sum.
        goal = tl.sum(weights, axis=0) - variance
    else:
        variance = tl.minimum(goal, CAPACITY - goal)
    deviation = MARGIN * tl.sqrt(tl.maximum(variance, 0.0))
    # The tokens of a group may be alike: the frequent ones often have the lowest ids.
    first = search(keys, weights, low, high, goal, deviation, GROUP, largest, IS_MASS)
    end = search(keys, weights, low, high, goal, -deviation, -GROUP, largest, IS_MASS) + 1
    if not IS_MASS:
        # All that top-k leaves is gathered where there is room for it, so that top-p finds it there.
        end = tl.where(needed <= CAPACITY // 2, high, end)
    if (attempt > 3) | ((attempt > 0) & (first == low) & (end == high)):
        ones = ((keys >= low) & (keys < high)).to(weights.dtype)
        median = search(keys, ones, low, high, 0.5 * tl.sum(ones, axis=0), 0.0, 0.0, largest, False)
        first, end = tl.maximum(median, low + 1), high
    return first, end


@triton.jit
def find_threshold(
    row,
    gathered_ptr,
    num_gathered,
    needed,
    total,
    low,
    largest,
    IS_MASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Return the greatest key of a logit above which, itself included, lies `needed` of the `total` from key low up.

    The measure is the number of tokens, or their Σ exp(z - largest). Where all fall short the key is low.
    Returns (key, mass above it, number of logits that have it, num_gathered). num_gathered, here and there, is the
    number of all keys from low up if they lie gathered, else 0.
    """
    at = tl.arange(0, CAPACITY)
    filler = order_key(tl.full((), float("-inf"), ACC))
    # The threshold is in [low, high); [first, end) is where it is sought.
    top = order_key(largest) + 1
    high, first, end = top, low, top
    mass, ties, attempt, is_found = tl.zeros((), ACC), tl.zeros((), tl.int32), 0, False
    while not is_found:
        number, inside = tl.where(num_gathered > 0, num_gathered, row[1]), total
        above, mass_above = tl.zeros((), ACC), tl.zeros((), ACC)
        if attempt > 0:
            number, inside, above, mass_above = gather(
                row, gathered_ptr, first, end, largest, IS_MASS, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE, CAPACITY
            )
        if (attempt > 0) | (num_gathered > 0):
            # What some threads wrote others read, before it is overwritten.
            tl.debug_barrier()
            keys = tl.load(gathered_ptr + at, mask=at < number, other=filler)
            tl.debug_barrier()
        else:
            keys = load_sample(row, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, CAPACITY)
            keys = tl.where(keys < low, filler, keys)
        if (above >= needed) & (end < high):
            low, first, end = end, end, high
        elif (above + inside < needed) & (first > low):
            high, first, end = first, low, first
        else:
            low, high = first, end
            masses = tl.where(keys > filler, tl.exp(from_order_key(keys) - largest), 0.0)
            weights = masses if IS_MASS else tl.where(keys > filler, 1.0, 0.0).to(ACC)
            if number <= CAPACITY:
                low = search(keys, weights, low, high, needed - above, 0.0, 0.0, largest, IS_MASS)
                ties = tl.sum((keys == low).to(tl.int32), axis=0)
                num_gathered = tl.where((attempt > 0) & (high == top), number, 0)
                is_found = True
            elif low + 1 >= high:
                ties, num_gathered, is_found = number, 0, True
            else:
                tail, share = above + inside - needed, CAPACITY / number
                first, end = guess(
                    keys, weights, low, high, needed - above, tail, share, largest, attempt, IS_MASS, CAPACITY
                )
            mass = mass_above + tl.sum(tl.where(keys > low, masses, 0.0), axis=0)
        attempt += 1
    return low, mass, ties, num_gathered


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
    seen, last, start = tl.zeros((), ACC), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    while (seen < quota) & (start < row[1]):
        columns = start + tl.arange(0, TILE)
        is_tie = order_key(load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)) == threshold
        rank = seen + tl.cumsum(is_tie.to(tl.int32), axis=0).to(ACC)
        last = tl.maximum(last, tl.max(tl.where(is_tie & (rank <= quota), columns, -1), axis=0))
        seen += tl.sum(is_tie.to(tl.int32), axis=0).to(ACC)
        start += TILE
    return last


@triton.jit
def find_limits(
    row,
    gathered_ptr,
    largest,
    total,
    top_k,
    top_p,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Return (key, column): top-k, then top-p, leave what is above the key, and its ties up to that column.

    Total is the Σ exp(z - largest) of the row.
    """
    # That of the lowest finite logit: others are never drawn.
    threshold = order_key(tl.full((), float("-inf"), ACC)) + 1
    last, num_gathered = tl.full((), 0x7FFFFFFF, tl.int32), tl.zeros((), tl.int32)
    if HAS_TOP_K:
        needed, number = top_k.to(ACC), row[1].to(ACC)
        threshold, mass, ties, num_gathered = find_threshold(
            row,
            gathered_ptr,
            num_gathered,
            needed,
            number,
            threshold,
            largest,
            False,
            HAS_SOFTCAP,
            HAS_FORBIDDEN,
            ACC,
            TILE,
            CAPACITY,
        )
        total = mass + ties.to(ACC) * tl.exp(from_order_key(threshold) - largest)
    if HAS_TOP_P:
        needed = top_p * total
        threshold, mass, ties, num_gathered = find_threshold(
            row,
            gathered_ptr,
            num_gathered,
            needed,
            total,
            threshold,
            largest,
            True,
            HAS_SOFTCAP,
            HAS_FORBIDDEN,
            ACC,
            TILE,
            CAPACITY,
        )
        # Of equals the first are taken, as long as the mass before one falls short.
        quota = tl.maximum(tl.ceil((needed - mass) / tl.exp(from_order_key(threshold) - largest)), 1.0)
        if quota < ties:
            last = nth_tie(row, threshold, quota, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE)
    return threshold, last
