"""The logit of a row from which up k tokens lie, or a mass of p: found exactly, without a sort.

A sample of the row tells between which two logits the threshold lies. One pass over the row verifies that and gathers
the few logits between them, in which it is found by bisection, in registers. A guess that fails costs further passes,
each with the bracket that the one before has left. Of a bracket that holds more than can be gathered a part is, spread
evenly, which is the sample for the next guess. Nothing of size V is written, and nothing at all for a row that fits
into registers.

Logits are compared as integers of their order (order_key). A row is the tuple (pointer, vocabulary, inner, outer,
forbidden_ptr, num_forbidden).
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
    # Groups begin at multiples of their size, and do not meet: there are more than CAPACITY logits.
    spread = at // GROUP * row[1] // (CAPACITY // GROUP) // GROUP * GROUP + at % GROUP
    columns = tl.where(row[1] > CAPACITY, spread, at)
    return order_key(load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC))


@triton.jit
def gather(
    row,
    gathered_ptr,
    low,
    high,
    shift,
    largest,
    IS_MASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write the keys from low to below high in the order of their columns, one of each 2^shift, CAPACITY at most.

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
            rank = number + tl.cumsum(is_inside.to(tl.int32), axis=0) - 1
            position = rank >> shift
            is_kept = is_inside & (position << shift == rank) & (position < CAPACITY)
            tl.store(gathered_ptr + position, key, mask=is_kept)
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
    """Return (first, end, shift): the bracket within [low, high) where the threshold probably lies, by a sample.

    As many tokens as `needed` are above it, or the mass `tail` below: of that a sample of this share shows the many
    small parts well; the few large ones it misses. Where the sample does not help, its median decides. There will be
    room for one of each 2^shift of the logits in the bracket.
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
    # Upwards the margin must not grow, or the largest logit would always be within it: it is that at the middle.
    margin = deviation + GROUP
    if IS_MASS:
        middle = search(keys, weights, low, high, goal, 0.0, 0.0, largest, IS_MASS)
        weight = tl.exp(from_order_key(middle) - largest)
        margin = deviation * tl.sqrt(weight) + GROUP * weight
    end = search(keys, weights, low, high, goal - margin, 0.0, 0.0, largest, IS_MASS) + 1
    if not IS_MASS:
        # All that top-k leaves is gathered where there is room for it, so that top-p finds it there.
        end = tl.where(needed <= CAPACITY // 2, high, end)
    if (attempt > 3) | ((attempt > 0) & (first == low) & (end == high)):
        ones = ((keys >= low) & (keys < high)).to(weights.dtype)
        median = search(keys, ones, low, high, 0.5 * tl.sum(ones, axis=0), 0.0, 0.0, largest, False)
        first, end = tl.maximum(median, low + 1), high
    number = tl.sum(((keys >= first) & (keys < end)).to(weights.dtype), axis=0) / share
    shift = tl.maximum(tl.ceil(tl.log2(number / CAPACITY)), 0.0).to(tl.int32)
    return first, end, shift


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
    mass, ties, shift = tl.zeros((), ACC), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    attempt, is_found = 0, False
    number, inside = tl.where(num_gathered > 0, num_gathered, row[1]), total
    above, mass_above = tl.zeros((), ACC), tl.zeros((), ACC)
    if num_gathered > 0:
        keys = tl.load(gathered_ptr + at, mask=at < number, other=filler)
    else:
        keys = load_sample(row, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, CAPACITY)
        keys = tl.where(keys < low, filler, keys)
    while not is_found:
        if attempt > 0:
            # What some threads write others read, before it is overwritten.
            tl.debug_barrier()
            number, inside, above, mass_above = gather(
                row, gathered_ptr, first, end, shift, largest, IS_MASS, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE, CAPACITY
            )
            tl.debug_barrier()
            keys = tl.load(gathered_ptr + at, mask=at < tl.cdiv(number, 1 << shift), other=filler)
        if (above >= needed) & (end < high):
            low, first, end, shift = end, end, high, 0
        elif (above + inside < needed) & (first > low):
            high, first, end, shift = first, low, first, 0
        else:
            low, high = first, end
            weights = tl.exp(from_order_key(keys) - largest) if IS_MASS else tl.full((CAPACITY,), 1.0, ACC)
            weights = tl.where(keys > filler, weights, 0.0)
            if (number <= CAPACITY) & (shift == 0):
                low = search(keys, weights, low, high, needed - above, 0.0, 0.0, largest, IS_MASS)
                ties = tl.sum((keys == low).to(tl.int32), axis=0)
                num_gathered = tl.where((attempt > 0) & (high == top), number, 0)
                is_found = True
            elif low + 1 >= high:
                ties, num_gathered, is_found = number, 0, True
            else:
                tail = above + inside - needed
                share = tl.minimum(tl.cdiv(number, 1 << shift), CAPACITY) / number
                first, end, shift = guess(
                    keys, weights, low, high, needed - above, tail, share, largest, attempt, IS_MASS, CAPACITY
                )
            if is_found:
                masses = tl.where(keys > low, tl.exp(from_order_key(keys) - largest), 0.0)
                mass = mass_above + tl.sum(masses, axis=0)
        attempt += 1
    return low, mass, ties, num_gathered
