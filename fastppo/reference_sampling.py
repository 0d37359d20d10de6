"""The draw of a token in plain PyTorch: the specification that the fast samplers are tested against.

Shapes: N rows, V vocabulary. The random number of a draw is a function of (seed, request, position) alone, so a token
does not depend on which rows share its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.reference import row_statistics, shaped_logits

_PHILOX_A, _PHILOX_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return high and low 32 bits of a·b, of words held in int64."""
    product = a * b  # wraps modulo 2^64, which keeps both words
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words (int64 tensors) that Philox-4x32-10 draws for a counter and a 64-bit seed.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Triton's `tl.philox` is the same.
    """
    key_a, key_b = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_b, low_b = _multiply(_PHILOX_B, c2)
        high_a, low_a = _multiply(_PHILOX_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _WEYL_A) & _LOW, (key_b + _WEYL_B) & _LOW
    return c0, c1, c2, c3


def uniforms(seed: int, requests: Tensor, positions: Tensor) -> Tensor:
    """Return one number of (0, 1) per (request, position), fp64: a function of seed, request and position alone."""
    words = philox(seed, positions & _LOW, requests & _LOW, (requests >> 32) & _LOW, torch.zeros_like(requests))
    return (words[0].double() + 0.5) / 2.0**32


def sample_tokens(
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
    greedy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (tokens (N,) int64, logprobs, entropies, kept_mass), one draw from each row of raw logits (N, V).

    The distribution is softmax(z), z = softcap·tanh(scale·u / softcap) / temperature. A row with `is_forbidden` (N,)
    bool (every row if None) may not draw `forbidden_ids` (E,); of the rest, top-k, then top-p choose what may be drawn.
    The token is where the cumulative distribution of these, in the order of their ids, passes `uniforms(seed,
    requests, positions)`, requests and positions (N,) int64; with `greedy` it is the most probable one, the lowest of
    equals. Log-prob and entropy are those of the whole distribution; kept_mass is the probability of what may be drawn
    (1 if greedy). The log-prob is NaN where nothing can be drawn: logits not finite, or all possible tokens forbidden.
    It alone is the mark of such a row: its token, entropy and kept mass mean nothing and differ between backends.
    """
    z = shaped_logits(logits, temperature, softcap, logit_scale)
    seen = z if forbidden_ids is None else _without(z, forbidden_ids, is_forbidden)
    if greedy:
        tokens = seen.argmax(-1)
    else:
        seen = truncated(seen, top_k, top_p)
        tokens = _inverse_cdf(seen, uniforms(seed, requests, positions))
    logprobs, entropies, _ = row_statistics(z, tokens)
    kept = torch.ones_like(logprobs)
    if not greedy and seen is not z:
        kept = torch.softmax(z.double(), -1).masked_fill(seen == float("-inf"), 0.0).sum(-1).to(z.dtype)
    return tokens, logprobs.masked_fill(~seen.amax(-1).isfinite(), float("nan")), entropies, kept


def _without(logits: Tensor, forbidden_ids: Tensor, is_forbidden: Tensor | None) -> Tensor:
    """Return the logits with -inf for the forbidden ids in the rows that may not draw them."""
    ids = forbidden_ids[(forbidden_ids >= 0) & (forbidden_ids < logits.shape[-1])]
    rows = torch.ones_like(logits[:, :1], dtype=torch.bool) if is_forbidden is None else is_forbidden[:, None]
    columns = torch.zeros_like(logits[:1], dtype=torch.bool).index_fill_(1, ids, True)
    return logits.masked_fill(rows & columns, float("-inf"))


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the logits (N, V) with -inf for the tokens that top-k, then top-p, leave out; one at least stays.

    Ties of the k-th stay. Then the most probable first, the lowest id of equals, until those before a token have
    top_p of the probability that top-k left. Source: Holtzman et al. (arXiv:1904.09751) for top-p.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = torch.softmax(logits.double(), -1).sort(dim=-1, descending=True, stable=True)
        is_outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(is_outside).scatter(-1, order, is_outside), float("-inf"))
    return logits


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token (N,) at which the cumulative distribution of softmax(logits) is above uniform (N,)."""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    # In proportion to what the probabilities really add up to, so that a token of probability 0 is never drawn.
    target = uniform * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return tokens.clamp_max(logits.shape[-1] - 1)  # a row of NaN finds none
