"""Who can draw tokens on this machine, and what must be drawn: scalar code in double precision."""

import math
from contextlib import contextmanager

import torch

from fastppo import ops
from fastppo.ops import backends

NATIVE = backends._native
ISAS = NATIVE.available_isas() if NATIVE is not None else []
# Triton where it interprets: then kernels run on the CPU.
SAMPLERS = ["reference", *ISAS, *(["triton"] if backends.is_interpreting() else [])]
# How far a sum of single-precision probabilities may be off.
SLACK = 1e-5


@contextmanager
def serving(sampler):
    """Let the reference, Triton, or the C++ code of one instruction set, serve the operations inside."""
    if sampler in ("reference", "triton"):
        with ops.use_backend(sampler):
            yield
        return
    before = NATIVE.isa()
    NATIVE.use_isa(sampler)
    try:
        with ops.use_backend("native"):
            yield
    finally:
        NATIVE.use_isa(before)


def log_distribution(logits, temperature=1.0, softcap=None, logit_scale=1.0):
    """Return the log-probabilities (N, V) in fp64."""
    z = logits.double() * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return torch.log_softmax(z / temperature, -1)


def possible_tokens(logp, top_k, top_p, forbidden=()):
    """Return the set of tokens of one row that may be drawn, with one Python loop over the sorted row."""
    ranked = sorted((-p, i) for i, p in enumerate(logp.tolist()) if i not in forbidden)
    if 0 < top_k < len(ranked):
        ranked = [(p, i) for p, i in ranked if p <= ranked[top_k - 1][0]]
    if top_p == 1:
        return {i for _, i in ranked}
    weights = [math.exp(ranked[0][0] - p) for p, _ in ranked]
    total, kept, before = math.fsum(weights), set(), 0.0
    for (_, i), weight in zip(ranked, weights, strict=True):
        if before >= top_p * total:
            break
        kept.add(i)
        before += weight
    return kept


def fits(logp, tokens, uniform, drawn):
    """Whether (token, kept mass) of one row belong to a draw from this set by this number."""
    token, kept = drawn
    mask = torch.zeros(len(logp), dtype=torch.bool)
    mask[list(tokens)] = True
    probs = torch.where(mask, logp.exp(), 0.0)
    # Relative to what is allowed, which may be next to nothing of the whole.
    cumulative = torch.where(mask, logp - logp[mask].logsumexp(0), -torch.inf).exp().cumsum(0)
    before = float(cumulative[token - 1]) if token else 0.0
    is_there = token in tokens and before - SLACK <= uniform <= float(cumulative[token]) + SLACK
    return is_there and abs(kept - float(probs.sum())) < SLACK
