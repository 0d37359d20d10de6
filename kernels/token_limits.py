"""Which tokens of a row of logits top-k and top-p leave, without a sort.

Both are a threshold on the logit: the greatest one above which, itself included, lie k tokens, or a mass of p
(row_threshold). Of equal logits at the threshold top-k leaves all, top-p the first.

What it costs: a plain draw reads the row 2 to 3 times (statistics, sum of the weights, and the sum again up to the
token), once more beside forbidden tokens. Top-k, top-p, and top-p after a top-k of up to CAPACITY / 2, add

- one pass to gather, a sample of CAPACITY logits (5% of a row of 151,936), and the gathered, CAPACITY words at most;
- where top-p cuts through equal logits, as in half precision, up to one pass until the last of them that is left.

That makes 3.1 to 5.3 reads for rows of 32,000 and 151,936 logits in half precision, 1.3 to 1.8 times those of a plain
draw (2.0 where a row has but a few values). A wrong guess costs two or three more, seldom: its margin is 4 standard
errors. Top-p after a greater top-k gathers anew: one more read, 1.7 to 2.5 times. None of this has been timed on a GPU.
"""

import triton
import triton.language as tl
from fastppo.kernels.row_threshold import find_threshold, from_order_key, load_allowed, order_key


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
