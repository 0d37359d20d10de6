"""Draw a token from each row of raw logits: temperature, forbidden tokens, top-k, top-p, log-prob and entropy.

The random number of a row is a function of (seed, request, position) alone: Philox-4x32-10 (Salmon et al., SC 2011).
The draw inverts the cumulative distribution of the allowed tokens in the order of their ids, summed in blocks of 128.
Nothing of size V is written. What top-k and top-p cost: see token_limits.
"""

import torch
import triton
import triton.language as tl
from fastppo.kernels.row_statistics import LAUNCH, accumulate_row, label_logprob
from fastppo.kernels.row_threshold import MAX_CAPACITY, from_order_key, load_allowed, order_key
from fastppo.kernels.scaling import accumulator, check_logits, check_rows, scales
from fastppo.kernels.token_limits import find_limits
from torch import Tensor

# The cumulative distribution is summed in blocks of this many tokens, of which a program reads 32 at a time.
WIDTH = 128
MAX_TILE = 32 * WIDTH


@triton.jit
def load_weights(
    row,
    columns,
    largest,
    threshold,
    last,
    HAS_LIMIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return exp(z - largest) of the columns that may be drawn, 0 of the others."""
    z = load_allowed(row, columns, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)
    weights = tl.exp(z - largest)
    if HAS_LIMIT:
        key = order_key(z)
        weights = tl.where((key > threshold) | ((key == threshold) & (columns <= last)), weights, 0.0)
    return weights


@triton.jit
def first_above(weights, before, target, SIZE: tl.constexpr):
    """Return the first index with a weight where before + cumulative sum exceeds the target, and the sum before it.

    A scan is rounded apart from a whole sum and need not reach it: then it is the last index with a weight.
    """
    at = tl.arange(0, SIZE)
    cumulative = before + tl.cumsum(weights, axis=0)
    first = tl.min(tl.where((cumulative > target) & (weights > 0), at, SIZE), axis=0)
    index = tl.minimum(first, tl.max(tl.where(weights > 0, at, 0), axis=0))
    return index, before + tl.sum(tl.where(at < index, weights, 0.0), axis=0)


@triton.jit
def draw(
    row,
    uniform,
    largest,
    threshold,
    last,
    HAS_LIMIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the token at `uniform` of the cumulative distribution, and the sum of all weights."""
    blocks, within = tl.arange(0, TILE // WIDTH), tl.arange(0, WIDTH)
    columns = blocks[:, None] * WIDTH + within[None, :]
    total = tl.zeros((), ACC)
    for start in range(0, row[1], TILE):
        weights = load_weights(
            row, start + columns, largest, threshold, last, HAS_LIMIT, HAS_SOFTCAP, HAS_FORBIDDEN, ACC
        )
        total += tl.sum(tl.sum(weights, axis=1), axis=0)
    # Just below the total, so that rounding never selects past the last token that has any probability.
    below = from_order_key(order_key(total) - 1)
    target = tl.minimum(uniform.to(ACC) * total, below)
    # The same sums again, up to the tile that the target is in; the one after the last is never needed.
    start, before, after = tl.full((), 0, tl.int32), tl.zeros((), ACC), tl.zeros((), ACC)
    sums = tl.zeros((TILE // WIDTH,), ACC)
    next_start = start
    while (after <= target) & (next_start < row[1]):
        start, before = next_start, after
        weights = load_weights(
            row, start + columns, largest, threshold, last, HAS_LIMIT, HAS_SOFTCAP, HAS_FORBIDDEN, ACC
        )
        sums = tl.sum(weights, axis=1)
        after = before + tl.sum(sums, axis=0)
        next_start = start + TILE
    block, before = first_above(sums, before, target, TILE // WIDTH)
    start += block * WIDTH
    weights = load_weights(row, start + within, largest, threshold, last, HAS_LIMIT, HAS_SOFTCAP, HAS_FORBIDDEN, ACC)
    index, _ = first_above(weights, before, target, WIDTH)
    # Without any weight there is no block to be in.
    return tl.where(total > 0, start + index, 0), total


@triton.jit
def weigh_allowed(row, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    """Return m = the largest logit that is not forbidden, or a finite floor, and Σ exp(z - m) of the allowed ones."""
    m, s = tl.full((), -1e30, ACC), tl.zeros((), ACC)
    for start in range(0, row[1], TILE):
        z = load_allowed(row, start + tl.arange(0, TILE), HAS_SOFTCAP, True, ACC)
        new_m = tl.maximum(m, tl.max(z, axis=0))
        s = s * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m), axis=0)
        m = new_m
    return m, s


@triton.jit(do_not_specialize=["seed", "top_k"])
def _sample_kernel(
    logits_ptr,
    requests_ptr,
    positions_ptr,
    forbidden_ptr,
    is_forbidden_ptr,
    tokens_ptr,
    logprobs_ptr,
    entropy_ptr,
    kept_ptr,
    gathered_ptr,
    seed: tl.uint64,
    top_k: tl.int32,
    top_p: tl.float64,
    inner: tl.float64,
    outer: tl.float64,
    vocabulary,
    num_forbidden,
    stride_row,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row_ptr, inner, outer = logits_ptr + at * stride_row, tl.full((), inner, ACC), tl.full((), outer, ACC)
    all_tokens = (row_ptr, vocabulary, inner, outer)
    m, log_s, entropy, _, _ = accumulate_row(all_tokens, all_tokens, HAS_SOFTCAP, False, False, ACC, TILE)
    largest, weight = m, tl.exp(log_s)
    if HAS_FLAGS:
        num_forbidden = tl.where(tl.load(is_forbidden_ptr + at), num_forbidden, 0)
    row = (row_ptr, vocabulary, inner, outer, forbidden_ptr, num_forbidden)
    if HAS_FORBIDDEN:
        largest, weight = weigh_allowed(row, HAS_SOFTCAP, ACC, TILE)
    has_limit: tl.constexpr = HAS_TOP_K or HAS_TOP_P
    threshold, last = find_limits(
        row,
        gathered_ptr + at * CAPACITY,
        largest,
        weight,
        tl.full((), top_k, tl.int32),
        tl.full((), top_p, ACC),
        HAS_TOP_K,
        HAS_TOP_P,
        HAS_SOFTCAP,
        HAS_FORBIDDEN,
        ACC,
        TILE,
        CAPACITY,
    )
    request, position = tl.load(requests_ptr + at), tl.load(positions_ptr + at)
    low, high = request.to(tl.uint32), (request >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, position.to(tl.uint32), low, high, low * 0)
    uniform = (word.to(tl.float64) + 0.5) * 2.0**-32
    token, total = draw(row, uniform, largest, threshold, last, has_limit, HAS_SOFTCAP, HAS_FORBIDDEN, ACC, TILE, WIDTH)
    kept = tl.zeros((), ACC) + 1.0
    if has_limit or HAS_FORBIDDEN:
        kept = tl.where(total > 0, total * tl.exp(largest - m - log_s), 0.0)
    tl.store(tokens_ptr + at, token.to(tl.int64))
    # False for a NaN as well.
    can_draw = (total > 0) & (total < float("inf"))
    logprob = label_logprob(all_tokens, token, m, log_s, HAS_SOFTCAP, ACC)
    tl.store(logprobs_ptr + at, tl.where(can_draw, logprob, float("nan")))
    tl.store(entropy_ptr + at, entropy)
    tl.store(kept_ptr + at, kept)


def sample(
    logits: Tensor,
    seed: int,
    requests: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden_ids: Tensor | None = None,
    is_forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token from each row of raw logits (N, V): (tokens int64, logprobs, entropies, kept_mass), (N,) each.

    Log-prob and entropy (fp32; fp64 for fp64 logits) are those of the whole distribution at the temperature, kept_mass
    is the probability of the tokens that could be drawn. `requests` and `positions` (N,) int64 and the seed make the
    random numbers. Rows of `is_forbidden` (N,) bool (None: all) do not draw `forbidden_ids` (E,) int64. top_k (0: off)
    leaves the tokens from the k-th largest logit up, ties included; top_p (1: off) then the most probable of them, of
    equals the lower ids, until their mass reaches it. The log-prob is NaN where nothing can be drawn: logits not
    finite, or all possible tokens forbidden; the other results of such a row mean nothing. Raises ValueError for
    tensors or numbers that cannot be served.
    """
    inner, outer = scales(temperature, softcap, logit_scale)
    check_logits(logits)
    check_rows(logits, torch.int64, requests=requests, positions=positions)
    _check_limits(logits, top_k, top_p, forbidden_ids, is_forbidden)
    forbidden_ids = None if forbidden_ids is None else forbidden_ids.contiguous()
    (num_rows, vocabulary), (dtype, acc) = logits.shape, accumulator(logits)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    results = tuple(torch.empty(num_rows, dtype=dtype, device=logits.device) for _ in range(3))
    capacity = min(MAX_CAPACITY, max(WIDTH, triton.next_power_of_2(vocabulary)))
    # Keys of logits are integers as wide as the sums. A row that fits into registers is not gathered.
    words = torch.int64 if dtype == torch.float64 else torch.int32
    is_limited = 0 < top_k < vocabulary or top_p < 1
    width = capacity if is_limited and vocabulary > capacity else 0
    gathered = torch.empty(num_rows, width, dtype=words, device=logits.device)
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits,
            requests,
            positions,
            forbidden_ids,
            is_forbidden,
            tokens,
            *results,
            gathered,
            seed & 0xFFFFFFFFFFFFFFFF,
            top_k,
            top_p,
            inner,
            outer,
            vocabulary,
            0 if forbidden_ids is None else len(forbidden_ids),
            logits.stride(0),
            HAS_TOP_K=0 < top_k < vocabulary,
            HAS_TOP_P=top_p < 1,
            HAS_FORBIDDEN=forbidden_ids is not None and len(forbidden_ids) > 0,
            HAS_FLAGS=is_forbidden is not None,
            HAS_SOFTCAP=inner != 0,
            ACC=acc,
            TILE=min(MAX_TILE, max(WIDTH, triton.next_power_of_2(vocabulary))),
            WIDTH=WIDTH,
            CAPACITY=capacity,
            **LAUNCH,
        )
    return tokens, results[0], results[1], results[2]


def _check_limits(
    logits: Tensor, top_k: int, top_p: float, forbidden_ids: Tensor | None, is_forbidden: Tensor | None
) -> None:
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected at least 0: 0 leaves all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number in (0, 1]: 1 leaves all tokens")
    check_rows(logits, torch.bool, is_forbidden=is_forbidden)
    if forbidden_ids is not None and (
        forbidden_ids.ndim != 1 or forbidden_ids.dtype != torch.int64 or forbidden_ids.device != logits.device
    ):
        described = f"{forbidden_ids.dtype} {tuple(forbidden_ids.shape)} on {forbidden_ids.device}"
        raise ValueError(f"forbidden_ids are {described}, expected torch.int64 (E,) on {logits.device}")
