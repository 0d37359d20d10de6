"""`PPOTrainer.train`: generate, score, step, until done; with a run folder, held-out prompts and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.atomic import Pathlike
from fastppo.config import SamplingConfig
from fastppo.engine.prompts import room_for_prompt
from fastppo.monitor import RunFolder
from fastppo.rewards import Reward, RewardPolicy
from fastppo.trainers import setup
from fastppo.trainers.forecast import Forecast
from fastppo.trainers.generation import warn_of_truncation
from fastppo.trainers.held_out import Measurement, measure
from fastppo.trainers.interrupts import Interrupts
from fastppo.trainers.missing import Missing
from fastppo.trainers.prompts import Prompts, PromptStream, read_prompts, reward_columns, texts
from fastppo.trainers.rollout import generate_and_score

_SAMPLES_PER_STEP = 4


@dataclass(frozen=True)
class LoopConfig:
    """The keyword arguments of `train` that are not generation arguments."""

    max_steps: int
    """Iterations, of `batch_size` prompts each."""
    reward_weights: Sequence[float] | None = None
    """One weight per reward."""
    reward_policy: RewardPolicy = field(default_factory=RewardPolicy)
    """How rewards are called that bring no policy of their own, and what it means when they fail."""
    reward_min_valid: float = 0.5
    """Share of a batch that must have scores; with fewer the batch is skipped."""
    query_column: str | None = None
    """The dataset's prompt column; by default the first of prompt, query, text."""
    eval_prompts: Any = None
    """Held-out prompts, measured before and after; the model that does best on them is kept in output_dir/best."""
    eval_reward: Any = None
    """What measures them; by default the reward of the training."""
    eval_every: int | None = None
    """Measure them every so many steps as well."""
    save_every: int | None = None
    """Write a checkpoint every so many steps."""
    output_dir: Pathlike | None = None
    """Folder for metrics, samples, curve, summary and the trained model; None writes nothing."""
    resume_from: Pathlike | None = None
    """A checkpoint, or the folder of the run that wrote it."""
    arguments: Mapping[str, Any] | None = None
    """What run.json should say of how the run was started."""
    console: bool = True
    """Show a line about each step."""
    overwrite: bool = False
    """Write into a folder that holds another run."""
    on_step: Callable[[dict[str, Any]], None] | None = None
    """Called with each step's statistics."""


@dataclass
class _Run:
    """What one call of `train` works with."""

    trainer: Any
    config: LoopConfig
    reward: Reward
    stream: PromptStream
    sampling: SamplingConfig
    eval_prompts: Prompts | None
    eval_reward: Reward
    missing: Missing
    folder: RunFolder | None = None
    forecast: Forecast | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    best: float = -math.inf


def train(trainer: Any, prompts: Any, reward: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """Train on prompts with a reward; return each step's statistics.

    Args:
        prompts: texts, chats, lists of token ids, or a dataset; its other columns go to the reward.
        reward: a callable (prompts, completions, **columns) -> list or tensor of numbers, a classification model, the
            trainer's model if it has a reward adapter, a URL, or a list of these; None leaves a response out of the
            update. See `fastppo.rewards.Reward`.
        kwargs: the fields of `LoopConfig`, `max_steps` above all; all others are generation arguments.

    An interrupt stops a rollout at once and lets an update finish; what is finished is saved, then it is raised. So is
    what a reward raises, unless its policy says otherwise.
    Raises ValueError for anything wrong with prompts or arguments, before the first token is generated.
    """
    names = {f.name for f in fields(LoopConfig)}
    config = LoopConfig(**{name: value for name, value in kwargs.items() if name in names})
    generation_kwargs = {name: value for name, value in kwargs.items() if name not in names}
    run = _prepare(trainer, prompts, reward, config, generation_kwargs)
    if config.resume_from is not None:
        _resume(run, config.resume_from)
    if trainer.current_step >= config.max_steps:
        raise ValueError(
            f"max_steps={config.max_steps} counts from the trainer's first step, and {trainer.current_step} are done; "
            "raise it to go on"
        )
    if config.output_dir is not None:
        run.forecast = _forecast(run)
        settings = {"loop": generation_kwargs | {"max_steps": config.max_steps}, "config": trainer.config.to_dict()}
        run.folder = RunFolder(
            config.output_dir,
            total_steps=config.max_steps,
            arguments=settings if config.arguments is None else dict(config.arguments),
            start_step=trainer.current_step,
            fresh=config.resume_from is None,
            console=config.console,
            overwrite=config.overwrite,
        )
        run.missing.folder = run.folder
    _go(run)
    return run.history


def _forecast(run: _Run) -> Forecast | None:
    """Plan the memory of a step, where the model can be rehearsed."""
    with suppress(NotImplementedError):
        return Forecast(run.trainer, max(map(len, run.stream.prompts.ids)), run.sampling.max_new_tokens)
    return None


def _prepare(trainer: Any, prompts: Any, reward: Any, config: LoopConfig, generation_kwargs: dict[str, Any]) -> _Run:
    """Check everything that can be checked before the first token is generated."""
    missing = Missing(config.reward_min_valid, trainer.config.max_skipped_steps)
    sampling = SamplingConfig.from_generation_kwargs(**generation_kwargs)
    options: dict[str, Any] = {
        "room": room_for_prompt(trainer.model, sampling.max_new_tokens),
        "overlong": trainer.config.overlong_prompts,
        "column": config.query_column,
    }
    stream = PromptStream(read_prompts(prompts, trainer.engine, **options), trainer.config.seed)
    held_out = config.eval_prompts
    held_out = None if held_out is None else read_prompts(held_out, trainer.engine, **options)
    settings = {"tokenizer": trainer.tokenizer, "policy": config.reward_policy, "on_problem": missing.note}
    columns = reward_columns(stream.prompts.take([]), [])
    trained = Reward(reward, config.reward_weights, columns=columns, **settings)
    measured = trained
    if config.eval_reward is not None:
        columns = reward_columns((held_out or stream.prompts).take([]), [])
        measured = Reward(config.eval_reward, columns=columns, **settings)
    warn_of_truncation(sampling)
    trainer.stop_ids = trainer.end_ids if sampling.stop_ids is None else frozenset(sampling.stop_ids)
    if not trainer.has_own_schedule:
        trainer.lr_scheduler = setup.make_scheduler(
            trainer.optimizer, trainer.config, config.max_steps, done=trainer.current_step
        )
    return _Run(trainer, config, trained, stream, sampling, held_out, measured, missing)


def _resume(run: _Run, directory: Pathlike) -> None:
    extra = run.trainer.resume_from(directory)
    then, now = extra.get("num_prompts"), len(run.stream.prompts)
    if then != now:
        raise ValueError(f"{directory} was written by a run with {then} prompts, and now there are {now}; use the same")
    run.stream.seek(extra["place"])
    run.summary = extra["summary"]
    run.missing.skipped = run.summary.get("skipped_batches", 0)
    run.best = -math.inf if extra["best"] is None else extra["best"]


def _save_checkpoint(run: _Run) -> None:
    assert run.config.output_dir is not None
    run.trainer.save_checkpoint(
        Path(run.config.output_dir) / f"checkpoint-{run.trainer.current_step:06d}",
        num_prompts=len(run.stream.prompts),
        place=run.stream.place,
        best=run.best if run.best > -math.inf else None,
        summary=run.summary | {"skipped_batches": run.missing.skipped},
    )


def _go(run: _Run) -> None:
    interrupts, start = Interrupts(), time.perf_counter()
    with interrupts.handled():
        try:
            if run.eval_prompts is not None and run.trainer.current_step == 0:
                run.summary |= _measured(run, "before").summary("before")
            while run.trainer.current_step < run.config.max_steps:
                _iterate(run, interrupts)
            if run.eval_prompts is not None:
                run.summary |= _measured(run, "after").summary("after")
        except BaseException as error:
            run.summary["stopped_by"] = type(error).__name__
            with interrupts.deferred():
                _finish(run, start)
                is_whole = isinstance(error, KeyboardInterrupt) or run.missing.has_raised(error)
                if is_whole and run.folder is not None and run.trainer.current_step:
                    _save_checkpoint(run)  # so that the run can be continued
            raise
        with interrupts.deferred():
            _finish(run, start)


def _iterate(run: _Run, interrupts: Interrupts) -> None:
    """One iteration: prompts, responses, scores, update, notes."""
    trainer = run.trainer
    place, served = run.stream.place, trainer.engine.num_requests
    try:
        prompts = run.stream.take(trainer.config.batch_size)
        rollout, completions, scores, times = generate_and_score(trainer, prompts, run.reward, run.sampling)
        if run.missing.skips(scores):
            return
    except BaseException:
        # What was not trained on is served and drawn again, as if nothing had happened.
        run.stream.seek(place)
        trainer.engine.num_requests = served
        raise
    with interrupts.deferred():
        stats = trainer.step(prompts.ids, rollout, scores)
        stats |= run.missing.stats()
        _note(run, prompts, completions, scores, stats | times | _throughput(rollout, times) | _raw(scores))


def _raw(scores: Tensor) -> dict[str, float]:
    """Return the reward as it came, before scaling, clipping and penalties."""
    known = scores[~scores.isnan()]
    std = float(known.std()) if len(known) > 1 else 0.0
    return {"env/reward_mean": float(known.mean()), "env/reward_std": std}


def _throughput(rollout: Any, times: Mapping[str, float]) -> dict[str, float]:
    figures = {"tokens/per_second": len(rollout.tokens) / times["time/generate"]}
    figures["tokens/finished_share"] = float(rollout.finished.float().mean())
    if torch.cuda.is_available():
        figures["memory/peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return figures


def _note(run: _Run, prompts: Prompts, completions: list[Any], scores: Any, stats: dict[str, Any]) -> None:
    """Write down what the step did; measure and save when it is time."""
    trainer, step = run.trainer, run.trainer.current_step
    if (
        run.eval_prompts is not None
        and run.config.eval_every
        and step % run.config.eval_every == 0
        and step < run.config.max_steps
    ):
        stats["eval/reward_mean"] = _measured(run, "best").reward_mean
    if trainer.config.log_with is not None:
        queries = texts(trainer.tokenizer, prompts)
        trainer.log_stats(stats, {"query": queries, "response": completions}, scores.tolist())
    run.history.append(stats)
    if run.folder is not None:
        rows = zip(texts(trainer.tokenizer, prompts), completions, scores.tolist(), strict=True)
        shown = [{"query": q, "completion": c, "reward": r, "step": step} for q, c, r in rows]
        run.folder.step(stats, shown[:_SAMPLES_PER_STEP])
    if run.config.save_every and step % run.config.save_every == 0 and run.folder is not None:
        _save_checkpoint(run)
    if run.config.on_step is not None:
        run.config.on_step(stats)


def _measured(run: _Run, when: str) -> Measurement:
    """Measure on the held-out prompts, and keep the model if it is the best so far."""
    assert run.eval_prompts is not None
    result = measure(run.trainer, run.eval_prompts, run.eval_reward, run.sampling)
    if when != "before" and result.reward_mean > run.best:
        run.best = result.reward_mean
        run.summary |= result.summary("best") | {"best_step": run.trainer.current_step}
        if run.config.output_dir is not None:
            run.trainer.save_pretrained(Path(run.config.output_dir) / "best")
    if run.folder is not None and when in ("before", "after"):
        run.folder.held_out(when, result.rows)
    return result


def _finish(run: _Run, start: float) -> None:
    if run.folder is None or run.config.output_dir is None:
        return
    run.summary |= {"steps": run.trainer.current_step, "seconds": time.perf_counter() - start}
    run.summary["skipped_batches"] = run.missing.skipped
    if run.forecast is not None:
        run.summary |= run.forecast.summary()
    if "kl_after" in run.summary:
        run.summary["kl"] = run.summary["kl_after"]
    run.trainer.save_pretrained(run.config.output_dir)
    run.folder.finish(run.summary)
