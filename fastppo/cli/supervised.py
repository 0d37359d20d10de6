"""`fastppo sft` and `fastppo reward`: from names on a command line to a trained model in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.cli.arguments import parse_dataclasses
from fastppo.cli.data import hold_out, read_rows
from fastppo.cli.loading import load_tokenizer
from fastppo.cli.train import DTYPES, lora_config

# Files that say what the model in a folder is; none is left of one that --overwrite replaces.
_WEIGHTS = ("adapter_config.json", "reward_adapter.json", "*.safetensors", "*.safetensors.index.json")


@dataclass
class SupervisedArguments:
    """What both commands need beside the trainer's settings."""

    model_name_or_path: str
    """Directory or hub name of the model to start from."""
    dataset_name: str
    """Rows to learn from: a .jsonl, .json, .csv, .txt or .parquet file, or a dataset of the hub."""
    config: str | None = None
    """YAML file of flags; those on the command line override it."""
    dataset_split: str = "train"
    """Split of a dataset of the hub."""
    max_rows: int | None = None
    """Read so many rows of the data at most."""
    eval_size: int = 0
    """Rows held out of training, spread over the data, and measured at the end."""
    overwrite: bool = False
    """Replace the model that output_dir holds already."""
    use_peft: bool = False
    """Train a LoRA adapter and freeze the model."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    """Layers that get an adapter; by default all linear ones but the head."""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    dtype: str | None = None
    """Of the model's weights: float32 (fp32), bfloat16 (bf16), float16 (fp16) or auto, the checkpoint's; by default
    float32 for what is trained."""

    def check(self, output_dir: str) -> None:
        """Raise ValueError, with the value, the expectation and the remedy, if a setting cannot work."""
        for name in ("max_rows", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        is_adapter = Path(self.model_name_or_path, "adapter_config.json").is_file()
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft and not is_adapter:
            raise ValueError("8-bit and 4-bit weights are not trained themselves; add --use_peft")
        if self.use_peft and is_adapter:
            raise ValueError(f"{self.model_name_or_path} is an adapter already; leave use_peft out to train it further")
        held = [name for name in ("config.json", "adapter_config.json") if Path(output_dir, name).is_file()]
        if held and not self.overwrite:
            raise ValueError(f"{output_dir} holds a model already ({held[0]}); add --overwrite, or set output_dir")

    def loading(self) -> dict[str, Any]:
        """Return the options of `from_pretrained`."""
        options: dict[str, Any] = {name: True for name in ("load_in_8bit", "load_in_4bit") if getattr(self, name)}
        return options if self.dtype is None else options | {"dtype": DTYPES[self.dtype]}


def sft(arguments: list[str]) -> int:
    """Run `fastppo sft` with these arguments; return the exit code."""
    from fastppo.trainers.sft import SFTConfig, SFTTrainer

    options, config, data = _parse("sft", SFTConfig, arguments)
    config.model_init_kwargs = options.loading() | (config.model_init_kwargs or {})
    return _train(SFTTrainer(options.model_name_or_path, config, **data), "generate")


def reward(arguments: list[str]) -> int:
    """Run `fastppo reward` with these arguments; return the exit code."""
    from fastppo.trainers.reward import RewardConfig, RewardTrainer

    options, config, data = _parse("reward", RewardConfig, arguments)
    if Path(options.model_name_or_path, "adapter_config.json").is_file():
        raise ValueError(f"{options.model_name_or_path} is an adapter; start from a whole model, with --use_peft")
    return _train(RewardTrainer(options.model_name_or_path, config, model_init_kwargs=options.loading(), **data), None)


def _parse(command: str, kind: type, arguments: list[str]) -> tuple[SupervisedArguments, Any, dict[str, Any]]:
    """Return the arguments, the trainer's settings and what it is made of: cheap things first, to fail early."""
    options, config = parse_dataclasses(f"fastppo {command}", (SupervisedArguments, kind), arguments)
    if config.output_dir == "trainer_output":
        config.output_dir = f"runs/{command}"
    options.check(config.output_dir)
    rows = read_rows(options.dataset_name, options.dataset_split, options.max_rows)
    rows, held_out = hold_out([_without_empty(row) for row in rows], options.eval_size, None)
    data = {
        "train_dataset": rows,
        "eval_dataset": held_out,
        "tokenizer": load_tokenizer(options.model_name_or_path),
        "peft_config": lora_config(options) if options.use_peft else None,
    }
    return options, config, data


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out the columns that a row does not have, which `read_rows` fills with None."""
    return {name: value for name, value in row.items() if value is not None}


def _train(trainer: Any, use: str | None) -> int:
    folder = trainer.args.output_dir
    trainer.save_metrics("train", trainer.train().metrics)
    held = {path: path.stat().st_ino for pattern in _WEIGHTS for path in Path(folder).glob(pattern)}
    trainer.save_model()
    for path, number in held.items():  # an adapter that is left there would be loaded instead of the new model
        if path.stat().st_ino == number:
            path.unlink()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        shown = [f"{name} {metrics[name]:.4g}" for name in ("eval_loss", "eval_accuracy") if name in metrics]
        print(f"held out: {', '.join(shown)}")
    print(f"the model is in {folder}")
    if use is not None:
        print(f"talk to it: fastppo {use} --model_name_or_path {folder}")
    return 0
