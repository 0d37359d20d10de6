"""What the Triton kernels should return, in fp64 by torch's log-softmax, autograd and sort, and rows to try them on."""

from typing import Any

import torch
from tolerances import close

SHAPES = [(3, 1), (5, 7), (4, 130), (1, 1000), (3, 9001)]
SCALINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0, "logit_scale": 0.3},
    {"temperature": 1.3, "softcap": 30.0},
    {"temperature": 0.01},
    {"temperature": 5.0, "logit_scale": 2.0},
]
OTHER_SCALING = {"temperature": 0.9, "softcap": 20.0}


def name_of(dtype: torch.dtype, shape: tuple[int, int], scaling: dict[str, float]) -> str:
    """Return the name of a case."""
    return "-".join([str(dtype).removeprefix("torch."), "x".join(map(str, shape)), *map(str, scaling.values())])


def random_rows(dtype: torch.dtype, rows: int, vocabulary: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, V) and labels (N,), every third label the most probable token."""
    generator = torch.Generator().manual_seed(seed)
    # Wide enough that softmax has a few peaks and a cap of 5 bites; rising, so that later blocks move the maximum.
    logits = 4 * torch.randn(rows, vocabulary, generator=generator) + torch.linspace(-9, 9, vocabulary)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = logits.argmax(1)[::3]
    return logits.to(dtype), labels


def random_numbers(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Return normally distributed numbers (N,)."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scaled(logits: torch.Tensor, temperature=1.0, softcap=None, logit_scale=1.0) -> torch.Tensor:
    """Return z in fp64."""
    z = logits.double() * logit_scale
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scaling: dict[str, float],
    ref_logits: torch.Tensor | None = None,
    ref_shape: dict[str, float] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return logprobs, entropy, logsumexp and, beside a reference, kl and its logsumexp, in fp64, differentiable."""
    z = scaled(logits, **scaling)
    log_p = torch.log_softmax(z, dim=-1)
    # Where a token is impossible its log-prob of -inf has no part in a sum.
    finite = torch.where(log_p == float("-inf"), 0.0, log_p)
    p = log_p.exp()
    found = log_p.gather(1, labels[:, None])[:, 0], -(p * finite).sum(-1), torch.logsumexp(z, dim=-1)
    if ref_logits is None:
        return found
    ref_z = scaled(ref_logits, **(scaling if ref_shape is None else ref_shape))
    ref_log_p = torch.log_softmax(ref_z, dim=-1)
    kl = torch.where(p > 0, p * (finite - ref_log_p), 0.0).sum(-1)
    return *found, kl, torch.logsumexp(ref_z, dim=-1)


def ppo_losses(
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    old: torch.Tensor | None,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    numbers: dict[str, float],
) -> torch.Tensor:
    """Return the weighted losses, by autograd's own clamp and maximum."""
    ratio = torch.exp(logprobs - (logprobs.detach() if old is None else old.double()))
    clipped = ratio.clamp(1 - numbers["clip_low"], 1 + numbers["clip_high"])
    loss = torch.maximum(-advantages.double() * ratio, -advantages.double() * clipped)
    if ref is not None:
        loss = loss + numbers.get("kl_coef", 0.0) * (logprobs - ref.double())
    if entropy is not None:
        loss = loss - numbers.get("entropy_coef", 0.0) * entropy
    return weights.double() * loss


def agree(
    ours: torch.Tensor,
    truth: torch.Tensor,
    logits: torch.Tensor,
    scaling: dict[str, float],
    head: str,
    factor: float = 4,
) -> None:
    """Assert that numbers agree as well as logits of this size, in their dtype, let them."""
    # A logit of size 30 is itself rounded by 16 units of 1; larger ones by more. Gradients grow by 1 / temperature.
    largest = scaled(logits, **scaling).abs().nan_to_num(0, 0, 0).max().item()
    grown = max(1.0, largest / 30) * max(1.0, truth.abs().nan_to_num(0, 0, 0).max().item())
    accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tolerance: dict[str, Any] = close(accumulated, factor) | {"atol": close(accumulated, factor * grown)["atol"]}
    torch.testing.assert_close(
        ours.double(), truth.detach(), **tolerance, equal_nan=True, msg=lambda message: f"{head}: {message}"
    )


def philox(seed: int, position: int, request: int) -> int:
    """Return the first word of Philox-4x32-10 for the counter (position, request low, request high, 0)."""
    mask = 0xFFFFFFFF
    counter, key = [position & mask, request & mask, request >> 32 & mask, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[0]


def allowed_tokens(z: torch.Tensor, forbidden: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Return the mask (N, V) of the tokens that may be drawn, by sorting."""
    z = z.masked_fill(forbidden, float("-inf"))
    order = z.sort(dim=-1, descending=True, stable=True).indices
    ordered = z.gather(1, order)
    if 0 < top_k < z.shape[1]:
        ordered = ordered.masked_fill(ordered < ordered[:, top_k - 1 : top_k], float("-inf"))
    probs = ordered.softmax(-1)
    inside = (ordered > float("-inf")) & (probs.cumsum(-1) - probs < top_p)
    return torch.zeros_like(forbidden).scatter(1, order, inside)


def forbidden_mask(given: dict) -> torch.Tensor:
    mask = torch.zeros(given["logits"].shape, dtype=torch.bool)
    if "forbidden_ids" in given:
        ids = given["forbidden_ids"]
        rows = given.get("is_forbidden", torch.ones(len(mask), dtype=torch.bool))
        mask[:, ids[ids < mask.shape[1]]] = rows[:, None]
    return mask


def check_draws(
    found: tuple[torch.Tensor, ...], given: dict, scaling: dict, limits: dict, exact: float, factor: float = 4
) -> None:
    """Assert that each token is the one at the row's random number, and that what is told of it is so."""
    tokens, logprobs, entropies, kept = found
    z = scaled(given["logits"], **scaling)
    allowed = allowed_tokens(z, forbidden_mask(given), **limits)
    assert tokens.dtype == torch.int64
    assert allowed.gather(1, tokens[:, None]).all()
    weights = z.masked_fill(~allowed, float("-inf")).softmax(-1)
    upper = weights.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    lower = upper - weights.gather(1, tokens[:, None])[:, 0]
    rows = zip(given["positions"].tolist(), given["requests"].tolist(), strict=True)
    uniforms = torch.tensor([philox(given["seed"], *row) + 0.5 for row in rows], dtype=torch.float64) / 2**32
    assert (lower - exact < uniforms).all()
    assert (uniforms < upper + exact).all()
    truths = statistics(given["logits"], tokens, scaling)
    agree(logprobs, truths[0], given["logits"], scaling, "logprobs", factor)
    agree(entropies, truths[1], given["logits"], scaling, "entropies", factor)
    agree(kept, (z.softmax(-1) * allowed).sum(-1), given["logits"], scaling, "kept_mass", factor)
