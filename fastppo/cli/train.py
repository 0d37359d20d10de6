"""`fastppo ppo`: from names on a command line to a trained model in a folder."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastppo.cli.arguments import parse_dataclasses
from fastppo.cli.data import hold_out, read_rows
from fastppo.cli.loading import check_directory, is_url, load_reward, load_tokenizer
from fastppo.config import PPOConfig
from fastppo.rewards.policy import RewardPolicy

DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "auto")}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class PPOArguments:
    """What `fastppo ppo` needs beside the settings of `PPOConfig`."""

    model_name_or_path: str
    """Directory or hub name of a language model, or of an adapter to train further."""
    dataset_name: str
    """Prompts: a .jsonl, .json, .csv, .txt or .parquet file, or a dataset of the hub."""
    reward: list[str] = field(default_factory=list)
    """module:function or file.py:function, called as (prompts, completions, **columns); the http(s) URL of a server; or
    the directory or hub name of a text-classification model. Several are summed; docs/rewards.md has the details."""
    reward_adapter: str | None = None
    """Directory or hub name of a reward adapter for the same base; its score is the last of the rewards."""
    reward_weights: list[float] | None = None
    """One weight per reward; by default 1 each."""
    reward_timeout: float | None = None
    """Seconds that a call of a reward may take, by default 300, or 60 for a URL; its samples then have no score."""
    reward_on_error: str = "raise"
    """What an exception in a reward means: raise, drop (its samples), or a number, their score."""
    reward_batch_size: int | None = None
    """Samples in a call of a reward function, which is then called while others are generated; by default all at once,
    or 8 for a URL."""
    reward_min_valid: float = 0.5
    """Share of a batch that must have scores; with fewer the batch is skipped."""
    config: str | None = None
    """YAML file of flags; those on the command line override it."""
    query_column: str | None = None
    """Column of the prompts; by default the first of prompt, query, text. The others go to the reward."""
    dataset_split: str = "train"
    """Split of a dataset of the hub."""
    max_prompts: int | None = None
    """Read so many rows of the data at most."""
    max_steps: int | None = None
    """Iterations, batch_size samples each; by default steps / batch_size."""
    output_dir: str = "runs/ppo"
    """Folder for the trained model, metrics, samples, curve and summary."""
    overwrite: bool = False
    """Delete what another run left in output_dir."""
    resume_from: str | None = None
    """Checkpoint, or folder of the run that wrote it; the other flags stay as they were."""
    save_every: int | None = None
    """Steps between checkpoints."""
    eval_size: int = 0
    """Prompts held out of training and measured before and after."""
    eval_every: int | None = None
    """Steps between measurements on them; the best model is kept in output_dir/best."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a response."""
    use_peft: bool = False
    """Train a LoRA adapter and freeze the model."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    """Layers that get an adapter; by default all linear ones but the head."""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    int8_meaning: str | None = None
    """What 8-bit layers compute: weight_only, the default, or row_wise, which rounds activations to int8 as well."""
    dtype: str | None = None
    """Of the model's weights: float32 (fp32), bfloat16 (bf16), float16 (fp16) or auto, the checkpoint's; by default
    float32 for what is trained."""

    def check(self) -> None:
        """Raise ValueError, with the value, the expectation and the remedy, if a setting cannot work."""
        for name in ("max_prompts", "max_steps", "save_every", "eval_every", "lora_r", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.reward and self.reward_adapter is None:
            raise ValueError(
                "nothing says what is good: set reward to module:function, a URL or a model, or reward_adapter to a "
                "folder"
            )
        if self.eval_every is not None and not self.eval_size:
            raise ValueError(f"eval_every={self.eval_every} needs held-out prompts; set eval_size, for example to 64")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        is_adapter = Path(self.model_name_or_path, "adapter_config.json").is_file()
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft and not is_adapter:
            raise ValueError("8-bit and 4-bit weights are not trained themselves; add --use_peft")


def ppo(arguments: list[str]) -> int:
    """Run `fastppo ppo` with these arguments; return the exit code."""
    options, config = parse_dataclasses("fastppo ppo", (PPOArguments, PPOConfig), arguments)
    options.check()
    config.check()
    if options.max_steps is None:
        options.max_steps = math.ceil(config.steps / config.batch_size)
    # Cheap things first: a wrong name should not cost the loading of a model.
    policy = _policy(options)
    rewards = [load_reward(name, policy, options.reward_timeout) for name in options.reward]
    rows, held_out = hold_out(
        read_rows(options.dataset_name, options.dataset_split, options.max_prompts),
        options.eval_size,
        options.query_column,
    )
    if options.reward_adapter is not None:
        check_directory(options.reward_adapter, "check reward_adapter")
    trainer = make_trainer(options, config)
    rewards += [trainer.model] if options.reward_adapter is not None else []
    return _train(options, trainer, rows, held_out, rewards, policy)


def _policy(options: PPOArguments) -> RewardPolicy:
    try:
        on_error: str | float = float(options.reward_on_error)
    except ValueError:
        on_error = options.reward_on_error
    given = {"timeout": options.reward_timeout, "batch_size": options.reward_batch_size, "on_error": on_error}
    return RewardPolicy(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def make_trainer(options: PPOArguments, config: PPOConfig) -> Any:
    """Load model and tokenizer, and make the trainer."""
    from transformers.utils.logging import disable_progress_bar

    from fastppo.core import set_seed
    from fastppo.models import loading, value_head
    from fastppo.trainers.ppo import PPOTrainer

    config.model_name, config.query_dataset = options.model_name_or_path, options.dataset_name
    kwargs: dict[str, Any] = {}
    tokenizer = load_tokenizer(options.model_name_or_path)  # a wrong name is told here
    is_seq2seq = loading.reads_with_encoder(options.model_name_or_path)
    kind = "Seq2Seq" if is_seq2seq else "Causal"
    if options.use_peft:
        kwargs["peft_config"] = lora_config(options, "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM")
    if options.dtype is not None:
        kwargs["dtype"] = DTYPES[options.dtype]
    for name in ("load_in_8bit", "load_in_4bit", "int8_meaning"):
        if getattr(options, name):
            kwargs[name] = getattr(options, name)
    if options.reward_adapter is not None:
        kwargs["reward_adapter"] = options.reward_adapter
    set_seed(config.seed)  # a value head that the model does not have, and a new adapter, start at random
    wrapper = getattr(value_head, f"AutoModelFor{kind}LMWithValueHead")
    model = wrapper.from_pretrained(options.model_name_or_path, **kwargs)
    disable_progress_bar()  # transformers' bars for saving would break the line that shows the steps
    return PPOTrainer(config, model, tokenizer=tokenizer)


def lora_config(options: Any, task_type: str = "CAUSAL_LM") -> Any:
    """Return the LoRA configuration that the `lora_` flags describe."""
    from peft import LoraConfig

    names = options.lora_target_modules
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if names in (None, ["all-linear"]) else names,
        task_type=task_type,
    )


def _train(
    options: PPOArguments,
    trainer: Any,
    rows: list[Any],
    held_out: list[Any] | None,
    rewards: list[Any],
    policy: RewardPolicy,
) -> int:
    from fastppo.trainers.interrupts import Terminated

    settings = dataclasses.asdict(options)
    shown = [str(reward) if is_url(name) else name for name, reward in zip(options.reward, rewards, strict=False)]
    keywords = {name: settings[name] for name in _TRAIN_KEYWORDS}
    try:
        trainer.train(
            rows,
            rewards,
            eval_prompts=held_out,
            reward_policy=policy,
            arguments={**settings, "reward": shown, **dataclasses.asdict(trainer.config)},
            **keywords,
        )
    except KeyboardInterrupt as interrupt:
        _report_interrupt(options, trainer)
        return 143 if isinstance(interrupt, Terminated) else 130
    print(f"\nmodel, metrics and curve are in {options.output_dir}")
    print(f"talk to it: fastppo generate --model_name_or_path {options.output_dir}")
    return 0


_TRAIN_KEYWORDS = (
    "max_steps",
    "reward_weights",
    "reward_min_valid",
    "query_column",
    "eval_every",
    "save_every",
    "output_dir",
    "resume_from",
    "overwrite",
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "stop_strings",
)


def _report_interrupt(options: PPOArguments, trainer: Any) -> None:
    saved = f"interrupted after step {trainer.current_step} of {options.max_steps}: "
    if Path(options.output_dir, "summary.json").is_file():
        saved += f"model, metrics, samples and summary up to there are in {options.output_dir}"
    else:
        saved += "nothing was saved yet"
    if any(Path(options.output_dir).glob("checkpoint-*")):
        saved += f"; --resume_from {options.output_dir} continues from the last checkpoint"
    print(f"fastppo: {saved}", file=sys.stderr)
