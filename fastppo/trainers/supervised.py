"""What SFTTrainer and RewardTrainer share: transformers' Trainer without its pickles, and TRL's constructor habits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, Trainer

from fastppo.atomic import atomic_files
from fastppo.models.loading import load_base


class SupervisedTrainer(Trainer):
    """Train with transformers' Trainer and save models as safetensors and JSON only.

    Optimiser, scheduler and generator states are not saved, because transformers writes them as pickles.
    Raises ValueError for `resume_from_checkpoint` and for `push_to_hub`.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Run the training and return transformers' TrainOutput."""
        resumed = resume_from_checkpoint or self.args.resume_from_checkpoint
        if resumed:
            raise ValueError(
                f"resume_from_checkpoint={resumed!r}: checkpoints hold the model only, expected None; "
                "load the model with from_pretrained(checkpoint) and train the remaining steps"
            )
        if self.args.push_to_hub:
            raise ValueError("push_to_hub=True: expected False; call model.push_to_hub(...) after training")
        return super().train(**kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            save_model(self.model, self.processing_class, folder, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        pass

    def _save_scaler(self, output_dir: str) -> None:
        pass

    def _save_rng_state(self, output_dir: str) -> None:
        pass


def save_model(model: Any, tokenizer: Any, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model and its tokenizer into `folder`, each file whole or not at all."""
    with atomic_files(folder) as target:
        model.save_pretrained(target, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def pin_memory_if_useful(args: Any) -> None:
    """Leave pinned memory off without an accelerator, where torch only warns about it."""
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False


def choose_tokenizer(model: Any, tokenizer: Any, processing_class: Any) -> Any:
    """Return the tokenizer given under its old or new name, or the one that was published with the model.

    Raises ValueError if both names are used, or neither for a model that was made in memory.
    """
    if tokenizer is not None and processing_class is not None:
        raise ValueError("tokenizer= and processing_class= were both given, expected one; they mean the same")
    chosen = processing_class if tokenizer is None else tokenizer
    if chosen is not None:
        return chosen
    if not model.config._name_or_path:
        raise ValueError(f"a {type(model).__name__} made in memory names no tokenizer; pass tokenizer=")
    return AutoTokenizer.from_pretrained(model.config._name_or_path)


def add_adapter(model: Any, peft_config: Any) -> Any:
    """Return a loaded model, wrapped in a new PEFT adapter if a configuration is given; see `models.loading`.

    A model with a value head is returned itself, with the adapter inside. Raises ValueError if there is one already.
    """
    inner = getattr(model, "pretrained_model", None)
    if inner is None:
        return load_base(model, peft_config=peft_config).model
    if peft_config is not None:
        raise ValueError(
            f"peft_config= with a {type(model).__name__}: give peft_config to its from_pretrained instead, so that it "
            "knows of its adapter"
        )
    return model
