"""The equality gate of the loss-head benchmark: who computes the same as fp64, about as closely as plain torch does."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import head_problem
from benchmarks.head_contenders import EVERYTHING, OURS, Contender
from benchmarks.head_problem import Outputs, Problem

# Errors allowed, as multiples of plain torch's in the same dtype. Of a peer it is only asked whether it does the same
# work: another order of summation costs it a few units, another formula or a narrower dtype inside much more.
BAR, PEER_BAR = 2.0, 10.0
# Plain torch itself, relative: beyond this the benchmark is wrong, not the arithmetic.
SANE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def quantities(outputs: Outputs, d_hidden: Tensor | None, d_weight: Tensor | None) -> dict[str, Tensor]:
    """Return by name what a run gave: the outputs, and the gradients of hidden (T, H) and weight (V, H)."""
    named = {
        "loss": outputs.loss, "row losses": outputs.row_losses, "logprobs": outputs.logprobs,
        "entropies": outputs.entropies, "hidden gradient": d_hidden, "weight gradient": d_weight,
    }  # fmt: skip
    return {name: value for name, value in named.items() if value is not None}


def distances(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Measure the errors of a run, absolute: of the loss one, of its rows the sum, of the rest the max and the rms."""
    found = {}
    for name, value in got.items():
        error = (value.double() - truth[name]).abs()
        # nan and inf must not look small.
        worst = float(error.max()) if error.isfinite().all() else math.inf
        if name == "loss":
            found[name] = worst
        elif name == "row losses":
            found[name] = float(error.sum())
        else:
            found |= {f"{name}, max": worst, f"{name}, rms": float(error.square().mean().sqrt())}
    return found


def scale(truth: dict[str, Tensor], error_name: str) -> float:
    """Return the largest value of what an error is of; of the loss, the sum that it would be without signs."""
    if error_name in ("loss", "row losses"):
        return float(truth["row losses"].abs().sum())
    return float(truth[error_name.split(",")[0]].abs().max())


@dataclass(frozen=True)
class Verdict:
    """How one contender did in one case: its errors, each also as a multiple of plain torch's."""

    errors: dict[str, float] = field(default_factory=dict)
    multiples: dict[str, float] = field(default_factory=dict)
    bar: float = BAR
    could_not_run: str = ""

    @property
    def has_passed(self) -> bool:
        """Tell whether every error is within the bar."""
        return not self.could_not_run and all(value <= self.bar for value in self.multiples.values())

    def __str__(self) -> str:
        if self.could_not_run:
            return f"could not run: {self.could_not_run}"
        worst = max(self.multiples, key=lambda name: self.multiples[name])
        return f"{'passes' if self.has_passed else 'fails'}: {worst} {self.multiples[worst]:.1f}x plain torch's"

    def as_json(self) -> dict[str, Any]:
        """Return the verdict and its errors."""
        errors = {name: float(f"{value:.4g}") for name, value in self.errors.items()}
        return {"has_passed": self.has_passed, "verdict": str(self), "errors": errors}


def units_of_error(truth: dict[str, Tensor], plain_errors: dict[str, float]) -> dict[str, float]:
    """Return what each error is divided by: plain torch's, and one rounding in fp32 lest that be zero by luck."""
    rounding = torch.finfo(torch.float32).eps
    units = {name: error + rounding * scale(truth, name) for name, error in plain_errors.items()}
    # The errors of the rows, which cannot cancel as those in their sum do.
    units["loss"] = units.pop("row losses")
    return units


def judge(contender: Contender, problem: Problem, truth: dict[str, Tensor], units: dict[str, float]) -> Verdict:
    """Run a contender once and compare it with the truth. An exception of ours is raised, a peer's is its verdict."""
    problem.clear_gradients()
    try:
        outputs = contender.run(problem)
    except Exception as error:  # whatever somebody else's code may raise on this device
        if contender.who == OURS:
            raise
        return Verdict(could_not_run=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    errors = distances(quantities(outputs, problem.hidden.grad, problem.weight.grad), truth)
    errors.pop("row losses", None)
    problem.clear_gradients()
    for name in units:
        is_owed = contender.gives == EVERYTHING or name == "loss" or "gradient" in name
        if is_owed and name not in errors:
            errors[name] = math.inf
    bar = BAR if contender.who == OURS else PEER_BAR
    return Verdict(errors, {name: error / units[name] for name, error in errors.items()}, bar)


def check_sane(truth: dict[str, Tensor], errors: dict[str, float], dtype: torch.dtype) -> None:
    """Raise if plain torch itself is far from fp64, for then nothing that is compared with it means anything."""
    for name, error in errors.items():
        largest = scale(truth, name)
        if not error <= SANE[dtype] * largest:
            raise RuntimeError(f"plain torch's error in {name} is {error:.2e}, over {SANE[dtype]} of {largest:.2e}")


def run_gate(
    contenders: Iterable[Contender], problem: Problem, modes: Iterable[bool], report: Callable[[str], None]
) -> dict[tuple[str, bool], Verdict]:
    """Judge everybody with the head trained (True) and frozen (False); keys are (who, is_trained)."""
    verdicts = {}
    everybody = list(contenders)
    for objective in head_problem.OBJECTIVES:
        group = [contender for contender in everybody if contender.objective == objective]
        if not group:
            continue
        truth = quantities(*head_problem.truth(problem, objective))
        for is_trained in modes:
            problem.weight.requires_grad_(is_trained)
            problem.clear_gradients()
            outputs = head_problem.plain(problem, objective)
            errors = distances(quantities(outputs, problem.hidden.grad, problem.weight.grad), truth)
            check_sane(truth, errors, problem.hidden.dtype)
            units = units_of_error(truth, errors)
            for contender in group:
                verdict = judge(contender, problem, truth, units)
                verdicts[contender.who, is_trained] = verdict
                report(f"{contender.who}, {'trained' if is_trained else 'frozen'}: {verdict}")
    return verdicts
