"""The settings of supervised fine-tuning, under the names that TRL gave them over the years."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from fastppo.trainers.supervised import pin_memory_if_useful

LONGEST_BY_DEFAULT = 1024
_DATASET_KWARGS = {"add_special_tokens", "skip_prepare_dataset"}
# What TRL's buffer of characters needed: here documents are packed by their tokens, and a stream begins anew by itself.
_OBSOLETE = ("infinite", "num_of_sequences", "chars_per_token", "dataset_num_proc")


@dataclass
class SFTConfig(TrainingArguments):
    """Configure supervised fine-tuning: transformers' TrainingArguments and the fields below."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "dataset_kwargs",
        "model_init_kwargs",
    ]

    dataset_text_field: str = field(default="text", metadata={"help": "column with the text or chat to learn"})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "tokens; None: tokenizer's or model's, at most 1024"}
    )
    max_length: int | None = field(default=None, metadata={"help": "the later name of max_seq_length"})
    packing: bool = field(default=False, metadata={"help": "fill rows with several documents, blind to each other"})
    eval_packing: bool | None = field(default=None, metadata={"help": "the same for evaluation; None: as packing"})
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "learn only `completion`; None: where rows have one; False: prompts too"}
    )
    assistant_only_loss: bool = field(default=False, metadata={"help": "learn only what the assistant says in chats"})
    dataset_batch_size: int = field(
        default=1000, metadata={"help": "rows tokenised, and packed of a stream, at a time"}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "add_special_tokens: whether the tokenizer adds those that begin a text"}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "for from_pretrained, load_in_8bit and load_in_4bit among them"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pin_memory_if_useful(self)
        check_settings(self)


def check_settings(args: Any) -> None:
    """Raise ValueError for settings of SFTConfig that cannot work."""
    for name in ("max_seq_length", "max_length", "dataset_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if None not in (args.max_length, args.max_seq_length) and args.max_length != args.max_seq_length:
        raise ValueError(
            f"max_length={args.max_length} and max_seq_length={args.max_seq_length} are two names of one setting; "
            "set one of them"
        )
    unknown = sorted(set(args.dataset_kwargs or {}) - _DATASET_KWARGS)
    if unknown:
        raise ValueError(f"dataset_kwargs has {unknown}, expected some of {sorted(_DATASET_KWARGS)}; leave them out")
    if args.packing and args.use_cache:
        # With a cache transformers takes a packed row for one document.
        raise ValueError("use_cache=True with packing: documents would see each other, expected use_cache=False")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the loss is computed without logits, expected 0"
        )


def settle(args: TrainingArguments | None, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a copy of the arguments in which what the trainer was given itself goes first, and what is no setting.

    Plain TrainingArguments get the defaults of SFTConfig's fields. Warns of TRL's names that have nothing to do here.
    """
    settings: Any = SFTConfig() if args is None else copy.copy(args)
    own = {f.name: f.default for f in dataclasses.fields(SFTConfig) if f.name in SFTConfig.__annotations__}
    missing = {name: default for name, default in own.items() if not hasattr(settings, name)}
    chosen = {name: given[name] for name in (*own, "neftune_noise_alpha") if given.get(name) is not None}
    for name, other in (("max_seq_length", "max_length"), ("max_length", "max_seq_length")):
        if name in chosen:  # two names of one setting
            chosen.setdefault(other, chosen[name])
    for name, value in (missing | chosen).items():
        setattr(settings, name, value)
    idle = sorted(name for name in _OBSOLETE if given.get(name) is not None)
    if idle:
        warnings.warn(
            f"{', '.join(idle)}: not needed here and not read. Documents are packed by their tokens, a stream begins "
            "anew by itself, and fast tokenizers use all cores",
            UserWarning,
            stacklevel=3,
        )
    settings.remove_unused_columns = False  # the columns are made here
    pin_memory_if_useful(settings)
    check_settings(settings)
    known = {*own, *_OBSOLETE, "neftune_noise_alpha"}
    return settings, {name: value for name, value in given.items() if name not in known}
