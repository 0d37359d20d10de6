"""Top-k and top-p of the Triton sampler, in the interpreter: what may be drawn of rows that make the search hard."""

import pytest
import torch
from interpreter import Call, interpret
from sampling_oracle import fits, log_distribution, possible_tokens

from fastppo.reference_sampling import uniforms

pytest.importorskip("triton", reason="triton has no wheel for this platform")

pytestmark = pytest.mark.slow  # a minute in the interpreter; test_kernels_sampling.py has the plain rows
# Longer than what is gathered at most (8192), by an odd number; and rows that fit.
LONG, SHORT = 20_001, 777
LIMITS = [
    {"top_k": LONG - 1},
    {"top_p": 0.9},
    {"top_p": 1 - 1e-7},
    {"top_k": 6000, "top_p": 0.95},
    {"top_k": LONG + 5, "top_p": 1e-7},
    {"top_k": 4096, "top_p": 0.6},
]


def zipf(vocabulary: int) -> torch.Tensor:
    """Return logits of words, the frequent ones anywhere."""
    ranks = 1 + torch.randperm(vocabulary, generator=torch.Generator().manual_seed(3))
    return -1.1 * ranks.float().log()


def misleading(vocabulary: int, is_high: bool) -> torch.Tensor:
    """Return logits that are high, or low, in the 512 groups of 16 that are sampled, and the other way round elsewhere.

    In a row that is not sampled every third stands for them.
    """
    at, noise = torch.arange(vocabulary), torch.randn(vocabulary, generator=torch.Generator().manual_seed(4))
    starts = torch.arange(512) * vocabulary // 512 // 16 * 16
    is_sampled = at % 3 == 0 if vocabulary < 8192 else torch.isin(at // 16 * 16, starts)
    return torch.where(is_sampled == is_high, 0.0, -2.3) + 0.05 * noise


def hard_rows(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(vocabulary, generator=generator)
    nothing, at = torch.full((vocabulary,), float("-inf")), torch.arange(vocabulary)
    return {
        "all zero, of both signs": torch.where(at % 2 == 1, 0.0, -0.0),
        "five values": torch.randint(5, (vocabulary,), generator=generator).float(),
        "one huge": torch.where(at == vocabulary // 2, 1e4, noise),
        "-inf but for a few": torch.where(at % (vocabulary // 9) == 1, noise, nothing),
        "-inf but for many": torch.where(at % 2 == 1, noise, nothing),
        "falling": noise.sort(descending=True).values,
        "words": zipf(vocabulary),
        "sample too high": misleading(vocabulary, True),
        "sample too low": misleading(vocabulary, False),
    }


def arguments(logits: torch.Tensor, **more) -> dict:
    rows = torch.arange(len(logits))
    return {"logits": logits, "seed": 5, "requests": rows, "positions": rows + 3} | more


def check(
    logits: torch.Tensor,
    draws: tuple[torch.Tensor, ...],
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden_ids: torch.Tensor | None = None,
) -> list[int]:
    """Return the rows whose token or kept mass is not that of a sorted row."""
    logp, rows = log_distribution(logits), torch.arange(len(logits))
    forbidden, wrong = set() if forbidden_ids is None else set(forbidden_ids.tolist()), []
    numbers = uniforms(5, rows, rows + 3)
    for row, drawn in enumerate(zip(draws[0].tolist(), draws[3].tolist(), strict=True)):
        # Sums that come within rounding of top_p may fall on either side.
        near = [top_p, min(top_p + 2e-6, 1.0), max(top_p - 2e-6, 0.5 * top_p)] if top_p < 1 else [1.0]
        sets = (possible_tokens(logp[row], top_k, limit, forbidden) for limit in near)
        possible = (tokens & set(logp[row].isfinite().nonzero()[:, 0].tolist()) for tokens in sets)
        if not any(fits(logp[row], tokens, float(numbers[row]), drawn) for tokens in possible):
            wrong.append(row)
    return wrong


def cases() -> dict[str, tuple[list[str], torch.Tensor, dict]]:
    """Return by name the names of rows, the rows, and what limits them."""
    rows, short = hard_rows(LONG), hard_rows(SHORT)
    found = {f"{limits}": (list(rows), torch.stack(list(rows.values())), limits) for limits in LIMITS}
    for limits in ({"top_k": 50}, {"top_p": 0.9}):
        found[f"short {limits}"] = list(short), torch.stack(list(short.values())), limits
    some = ["five values", "-inf but for many", "words"]
    found["double"] = some, torch.stack([rows[name] for name in some]).double(), {"top_k": 6000, "top_p": 0.95}
    some = ["falling", "one huge", "words", "five values"]
    logits = torch.stack([rows[name] for name in some])
    forbidden = torch.unique(torch.cat([logits.argmax(-1), torch.arange(0, LONG, 2000)]))
    for limits in ({"top_p": 0.7}, {"top_k": 300, "top_p": 0.7}):
        found[f"forbidden {limits}"] = some, logits, limits | {"forbidden_ids": forbidden}
    return found


CASES = cases()
PATHS = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}]
READ = {
    "flat": torch.randn(32_000, generator=torch.Generator().manual_seed(6)).bfloat16(),
    "words": zipf(32_000),
    "words in order": zipf(151_936).sort(descending=True).values.bfloat16(),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    calls = {
        case: Call("fastppo.kernels.sampling.sample", arguments(logits, **limits))
        for case, (_, logits, limits) in CASES.items()
    }
    for name, logits in READ.items():
        for limits in PATHS:
            calls[f"read {name} {limits}"] = Call("kernel_functions.bytes_read", arguments(logits[None], **limits))
    return interpret(tmp_path_factory.mktemp("interpreter"), calls)


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_drawn_of_hard_rows(case, interpreted):
    names, logits, limits = CASES[case]
    wrong = check(logits, interpreted[case], **limits)
    assert not wrong, [names[row] for row in wrong]


@pytest.mark.parametrize("name", READ)
def test_limits_at_most_double_what_is_read(name, interpreted):
    plain, *limited = (float(interpreted[f"read {name} {limits}"][0]) for limits in PATHS)
    assert max(limited) <= 2 * plain, f"{[count / plain for count in limited]} times a plain draw"
