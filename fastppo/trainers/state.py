"""Saving a trainer, and continuing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastppo import checkpoint
from fastppo.atomic import Pathlike, atomic_files
from fastppo.config import PPOConfig
from fastppo.models.network import weight_version

_MOMENTS = ("mean", "std", "var", "count")
# Settings that decide what the next step computes: a run that changes them is another run.
_FIXED = ("seed", "batch_size", "learning_rate", "optim", "kl_penalty", "compat", "critic", "critic_warmup_steps")


def save_pretrained(trainer: Any, directory: Pathlike, **kwargs: Any) -> None:
    """Save the model (or adapter) with its value head, and the tokenizer."""
    trainer.model.save_pretrained(directory, **kwargs)
    if trainer.tokenizer is not None:
        with atomic_files(directory) as target:
            trainer.tokenizer.save_pretrained(target)


def save_checkpoint(trainer: Any, directory: Pathlike, extra: dict[str, Any]) -> Path:
    """Write a checkpoint between two steps; `extra` is JSON of the caller's that `resume_from` returns."""
    state = {
        "step": trainer.current_step,
        "kl_coef": trainer.kl_ctl.value,
        "running": {name: getattr(trainer.running, name) for name in _MOMENTS},
        "requests": trainer.engine.num_requests,
        "temperature": trainer.temperature,
        "nonfinite_in_a_row": trainer.nonfinite_in_a_row,
        "records_refused": trainer.records.are_refused,
        "best_score": trainer.best_score if trainer.best_score > float("-inf") else None,
        "schedule": _schedule_state(trainer.lr_scheduler),
        "cursor": _cursor(trainer),
        "settings": {name: getattr(trainer.config, name) for name in _FIXED},
        "reference": _reference_version(trainer),
        "extra": extra,
    }
    return checkpoint.save_checkpoint(directory, trainer.model, trainer.tokenizer, trainer.optimizer, state)


def resume_from(trainer: Any, directory: Pathlike) -> dict[str, Any]:
    """Load a checkpoint (or the newest one in a run's folder) into a trainer made as the first one was."""
    directory = Path(directory)
    if not (directory / "state.json").is_file():
        directory = checkpoint.latest_checkpoint(directory)
    state = checkpoint.load_checkpoint(directory, trainer.model, trainer.optimizer, lambda s: _check(trainer, s))
    trainer.current_step, trainer.kl_ctl.value = state["step"], state["kl_coef"]
    for name in _MOMENTS:
        setattr(trainer.running, name, state["running"][name])
    trainer.engine.num_requests, trainer.temperature = state["requests"], state["temperature"]
    trainer.nonfinite_in_a_row = state["nonfinite_in_a_row"]
    trainer.records.are_refused = state.get("records_refused", False)
    trainer.best_score = float("-inf") if state["best_score"] is None else state["best_score"]
    if trainer.lr_scheduler is not None and state["schedule"] is not None:
        trainer.lr_scheduler.load_state_dict(state["schedule"])
    if trainer.dataloader is not None and state["cursor"] is not None:
        trainer.dataloader.sampler.epoch, trainer.dataloader.sampler.drawn = state["cursor"]
    extra: dict[str, Any] = state["extra"]
    return extra


def _check(trainer: Any, state: dict[str, Any]) -> None:
    now = {name: getattr(trainer.config, name) for name in _FIXED}
    # A setting that was not known then had its default.
    then = {name: state["settings"].get(name, getattr(PPOConfig, name)) for name in _FIXED}
    changed = [f"{name}: {then[name]!r} then, {now[name]!r} now" for name in _FIXED if then[name] != now[name]]
    if changed:
        raise ValueError(f"the checkpoint was written with other settings ({'; '.join(changed)}); use the same ones")
    if state["reference"] != _reference_version(trainer):
        raise ValueError(
            "the checkpoint was written with another reference model; make the trainer from the model that the run "
            "started from, not from the checkpoint, and then resume"
        )


def _reference_version(trainer: Any) -> list[int]:
    """Fingerprint of the reference: its own model, or the frozen part of the policy with the adapter off."""
    if trainer.ref_model is not None:  # its value head is never used, and starts at random
        return list(weight_version(getattr(trainer.ref_model, "pretrained_model", trainer.ref_model)))
    frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    return list(weight_version(torch.nn.ParameterList(frozen)))


def _schedule_state(schedule: Any) -> dict[str, Any] | None:
    """Return the part of a schedule's state that is data; its functions come with the trainer that resumes."""
    if schedule is None:
        return None
    return {name: value for name, value in schedule.state_dict().items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _cursor(trainer: Any) -> list[int] | None:
    if trainer.dataloader is None:
        return None
    sampler = trainer.dataloader.sampler
    return [sampler.epoch, sampler.drawn]
