"""The demo from end to end: corpus, language model, reward model, PPO, and what came of it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastppo.atomic import Pathlike, write_json
from fastppo.config import PPOConfig
from fastppo.demo.corpus import Review, preference_pairs, prompts, reviews
from fastppo.demo.table import side_by_side

_SAMPLES_SHOWN = 6
_WIDEST = 120
# Each part draws from a stream of its own, whatever the seed of the command.
_REVIEWS, _PAIRS, _HELD_OUT_PAIRS, _PROMPTS, _HELD_OUT_PROMPTS = range(5)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the default takes about two minutes on two cores."""

    reviews: int = 13_000
    pairs: int = 2_000
    held_out_pairs: int = 256
    prompts: int = 2_048
    held_out_prompts: int = 256
    max_steps: int = 28
    batch_size: int = 128
    max_new_tokens: int = 48


def main(output_dir: Pathlike, seed: int = 0, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Run the demo into `output_dir`; return what summary.json holds."""
    start, folder = time.perf_counter(), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        summary = _run(folder, seed, sizes)
        summary["seconds"] = time.perf_counter() - start
        write_json(folder / "summary.json", summary)
    _show(folder, summary)
    return summary


def _run(folder: Path, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Run the parts one after the other, each with its line."""
    parts: dict[str, float] = {}
    with _part(parts, "corpus", "Writing a corpus of film reviews") as note:
        corpus, pairs, held_out_pairs = _corpus(seed, sizes)
        training, held_out = _prompts(seed, sizes, {review.prompt for review in corpus})
        note(f"{len(corpus):,} reviews, {len(pairs):,} preference pairs")
    with _part(parts, "sft", "Teaching a new language model to write reviews") as note:
        from fastppo.demo.models import train_language_model, train_reward_model, train_tokenizer

        tokenizer = train_tokenizer(review.text for review in corpus)
        model = train_language_model(corpus, tokenizer, folder / "language_model", seed)
        note(f"{model.num_parameters():,} weights")
    with _part(parts, "reward_model", "Teaching a reward model which reviews are liked") as note:
        scorer, accuracy = train_reward_model(model, pairs, held_out_pairs, tokenizer, folder / "reward_model", seed)
        note(f"right about {accuracy:.0%} of {len(held_out_pairs)} new pairs")
    with _part(parts, "ppo", "Improving the language model with PPO") as note:
        _improve(model, tokenizer, scorer, training, held_out, folder, seed, sizes)
        measured: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        note(f"mean reward {measured['reward_before']:+.2f} before, {measured['reward_after']:+.2f} after")
    return measured | {"reward_model_accuracy": accuracy, "parts_seconds": parts, "seed": seed}


def _corpus(seed: int, sizes: Sizes) -> tuple[list[Review], list[dict[str, str]], list[dict[str, str]]]:
    pairs = preference_pairs(sizes.pairs, _stream(seed, _PAIRS))
    held_out_pairs = preference_pairs(sizes.held_out_pairs, _stream(seed, _HELD_OUT_PAIRS))
    return reviews(sizes.reviews, _stream(seed, _REVIEWS)), pairs, held_out_pairs


def _prompts(seed: int, sizes: Sizes, seen: set[str]) -> tuple[list[str], list[str]]:
    """Return the prompts to train on, and others that occur neither among them nor in the corpus."""
    training = prompts(sizes.prompts, _stream(seed, _PROMPTS))
    drawn = prompts(2 * sizes.held_out_prompts, _stream(seed, _HELD_OUT_PROMPTS))
    known = seen | set(training)
    return training, [prompt for prompt in drawn if prompt not in known][: sizes.held_out_prompts]


def _stream(seed: int, part: int) -> int:
    return 1_000 * seed + part


def _improve(
    model: Any,
    tokenizer: Any,
    scorer: Any,
    training: list[str],
    held_out: list[str],
    folder: Path,
    seed: int,
    sizes: Sizes,
) -> None:
    from fastppo.demo.models import ReviewReward
    from fastppo.models.value_head import AutoModelForCausalLMWithValueHead
    from fastppo.trainers.ppo import PPOTrainer

    config = PPOConfig(
        exp_name="demo",
        seed=seed,
        batch_size=sizes.batch_size,
        mini_batch_size=sizes.batch_size,
        ppo_epochs=4,
        lam=1.0,
        vf_coef=0.01,  # the critic shares a small trunk: a larger share of it would drown the policy's gradient
        learning_rate=3e-4,
        critic_learning_rate=1e-2,  # it starts at random, and is one vector
        lr_scheduler_type="linear",
        init_kl_coef=0.2,
        adap_kl_ctrl=False,
    )
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(model), tokenizer=tokenizer)
    trainer.train(
        training,
        ReviewReward(scorer, tokenizer),
        max_steps=sizes.max_steps,
        max_new_tokens=sizes.max_new_tokens,
        eval_prompts=held_out,
        output_dir=folder,
        overwrite=True,
        console=sys.stdout.isatty(),
        arguments={"seed": seed, "sizes": asdict(sizes), "config": config.to_dict()},
    )


@contextmanager
def _part(seconds: dict[str, float], name: str, title: str) -> Iterator[Callable[[str], None]]:
    """Announce a part, time it, and end its line with the note that the block leaves."""
    notes: list[str] = []
    print(f"{title} ...", flush=True)
    start = time.perf_counter()
    yield notes.append
    seconds[name] = time.perf_counter() - start
    print(f"  {seconds[name]:.0f} s: {'; '.join(notes)}", flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of the libraries underneath away from the demo's own lines."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

            had_bars = is_progress_bar_enabled()
            disable_progress_bar()
            try:
                yield
            finally:
                if had_bars:
                    enable_progress_bar()
    finally:
        logging.disable(disabled)


def _show(folder: Path, summary: dict[str, Any]) -> None:
    before, after = (_rows(folder / f"held_out_{when}.jsonl")[:_SAMPLES_SHOWN] for when in ("before", "after"))
    width = min(_WIDEST, shutil.get_terminal_size().columns - 1)
    print(f"\n{side_by_side(before, after, width)}\n")
    print(f"{'on held-out prompts':20}{'before':>9}{'after':>9}")
    for title, name, form in (
        ("mean reward", "reward", "+.2f"),
        ("distinct bigrams", "distinct_2", ".3f"),
        ("length in tokens", "length", ".1f"),
    ):
        before_and_after = (format(summary[f"{name}_{when}"], form) for when in ("before", "after"))
        print(f"{title:20}{''.join(f'{number:>9}' for number in before_and_after)}")
    gain = (summary["reward_after"] - summary["reward_before"]) / summary["reward_std_before"]
    print(f"\nThe reward rose by {gain:.1f} standard deviations of a review's reward before,")
    print(f"at a KL of {summary['kl']:.1f} nats from the model before, in {summary['seconds']:.0f} s altogether.\n")
    for name, content in _FILES:
        print(f"  {folder / name}  {content}")


_FILES: Sequence[tuple[str, str]] = (
    ("learning_curve.png", "the picture of the training"),
    ("held_out_before.jsonl", "all reviews before, with rewards"),
    ("held_out_after.jsonl", "all reviews after"),
    ("metrics.jsonl", "every step's numbers"),
    ("summary.json", "the figures above"),
    ("model.safetensors", "the improved model; fastppo generate talks to it"),
)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
