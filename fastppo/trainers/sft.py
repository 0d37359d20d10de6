"""Supervised fine-tuning on texts or on prompts with completions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from fastppo.engine.prompts import context_length
from fastppo.trainers.supervised import SupervisedTrainer, add_adapter, choose_tokenizer, pin_memory_if_useful

IGNORED = -100  # what torch's cross-entropy skips
_LONGEST_BY_DEFAULT = 1024

Row = dict[str, list[int]]
_log = logging.getLogger(__name__)


@dataclass
class SFTConfig(TrainingArguments):
    """Configure supervised fine-tuning: transformers' TrainingArguments and the fields below."""

    dataset_text_field: str = field(default="text", metadata={"help": "column with the text to learn"})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "tokens; None: tokenizer's or model's, at most 1024"}
    )
    packing: bool = field(default=False, metadata={"help": "fill rows with several documents, blind to each other"})

    def __post_init__(self) -> None:
        super().__post_init__()
        pin_memory_if_useful(self)


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a causal language model on texts, each ended by EOS where the tokenizer has one.

    A dataset is a `datasets.Dataset` or any sequence of dicts with a text column, with `prompt` and `completion` (only
    the completion is learned), or with ready `input_ids` and optional `labels`; `formatting_func(row) -> str` makes the
    text itself. `dataset_text_field`, `packing` and `max_seq_length` given here take precedence over those of `args`.
    Raises ValueError if rows have none of these columns or leave nothing to learn, and for packing with `use_cache`.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Callable[[list[Row]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        max_seq_length: int | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = SFTConfig() if args is None else args
        if isinstance(model, str):
            # Weights that are trained are fp32 whatever the checkpoint's dtype.
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = choose_tokenizer(model, tokenizer, processing_class)
        text_field = args.dataset_text_field if dataset_text_field is None else dataset_text_field
        length = max_seq_length or args.max_seq_length or _default_length(model, tokenizer)
        packed = args.packing if packing is None else packing
        if packed and args.use_cache:
            # With a cache transformers takes a packed row for one document.
            raise ValueError("use_cache=True with packing: documents would see each other, expected use_cache=False")
        prepare = partial(_prepare, tokenizer, length, text_field, formatting_func, packed)
        super().__init__(
            model=add_adapter(model, peft_config),
            args=args,
            data_collator=data_collator or RightPadding(tokenizer),
            train_dataset=prepare(train_dataset),
            eval_dataset=prepare(eval_dataset),
            processing_class=tokenizer,
            **trainer_arguments,
        )


def _default_length(model: Any, tokenizer: Any) -> int:
    """Return the tokens of a row that tokenizer and model both have room for."""
    length: int = min(tokenizer.model_max_length, context_length(model) or _LONGEST_BY_DEFAULT, _LONGEST_BY_DEFAULT)
    return length


def _prepare(
    tokenizer: Any,
    max_length: int,
    text_field: str,
    formatting_func: Callable[[Mapping[str, Any]], str] | None,
    packed: bool,
    dataset: Any,
) -> Any:
    """Encode a dataset, or each of several given by name, and pack it if asked to."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        one = partial(_prepare, tokenizer, max_length, text_field, formatting_func, packed)
        return {name: one(part) for name, part in dataset.items()}
    encoded = encode(dataset, tokenizer, max_length, text_field, formatting_func)
    return pack(encoded, max_length) if packed else encoded


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    text_field: str = "text",
    formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
) -> list[Row]:
    """Tokenise rows into `input_ids` and `labels` of at most `max_length` tokens, ended by EOS where the text ends.

    Raises ValueError if a row has no known column, or if no row has a token to learn.
    """
    encoded = [_encode_row(row, tokenizer, text_field, formatting_func) for row in rows]
    encoded = [{name: ids[:max_length] for name, ids in row.items()} for row in encoded]
    kept = [row for row in encoded if any(label != IGNORED for label in row["labels"])]
    if encoded and not kept:
        raise ValueError(
            f"none of {len(encoded)} rows has a token to learn within {max_length} tokens; raise max_seq_length"
        )
    if len(kept) < len(encoded):
        _log.warning("left out %d rows with nothing to learn within %d tokens", len(encoded) - len(kept), max_length)
    return kept


def _encode_row(
    row: Mapping[str, Any], tokenizer: Any, text_field: str, formatting_func: Callable[[Mapping[str, Any]], str] | None
) -> Row:
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
    else:
        prompt, text = _prompt_and_text(row, text_field, formatting_func)
        ids, labels = _tokenise(prompt, text, tokenizer)
        end = tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
            labels.append(IGNORED)
        if end is not None:
            # By position, never by value: a real EOS is learned also where pad and EOS are the same token.
            labels[-1] = end
    # Nothing precedes the first token, and in a packed row the token before it belongs to another document.
    return {"input_ids": ids, "labels": [IGNORED, *labels[1:]]}


def _prompt_and_text(
    row: Mapping[str, Any], text_field: str, formatting_func: Callable[[Mapping[str, Any]], str] | None
) -> tuple[str, str]:
    if formatting_func is not None:
        text = formatting_func(row)
        if not isinstance(text, str):
            raise ValueError(
                f"formatting_func returned {type(text).__name__}, expected str: it gets one row and returns its text"
            )
        return "", text
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["prompt"] + row["completion"]
    if text_field not in row:
        raise ValueError(
            f"a row has columns {sorted(row)}, expected {text_field!r}, `prompt` with `completion`, or `input_ids`; "
            "name the text column with dataset_text_field= or pass formatting_func="
        )
    return "", row[text_field]


def _tokenise(prompt: str, text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Label the tokens that reach beyond the prompt, found by their place in the text."""
    if not prompt:
        ids = tokenizer(text)["input_ids"]
        return ids, list(ids)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} reports no offsets, expected a fast tokenizer for prompts with completions"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [token if end > len(prompt) else IGNORED for token, end in zip(ids, ends, strict=True)]


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Join rows, in their order, into rows of up to `max_length` tokens; `position_ids` start anew at each document."""
    packed: list[Row] = []
    for row in rows:
        if not packed or len(packed[-1]["input_ids"]) + len(row["input_ids"]) > max_length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        for name, ids in {**row, "position_ids": range(len(row["input_ids"]))}.items():
            packed[-1][name].extend(ids)
    return packed


class RightPadding:
    """Collate rows of ids into (B, S) tensors, padded on the right."""

    def __init__(self, tokenizer: Any) -> None:
        # Labels and mask come from lengths, so any id can fill the gap.
        pad_id = tokenizer.pad_token_id or 0
        self.fill = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0, "attention_mask": 0}

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Stack `input_ids`, `labels` and either `position_ids` (packed) or `attention_mask`."""
        if "position_ids" not in rows[0]:
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str) -> list[list[int]]:
            return [row[name] + [self.fill[name]] * (longest - len(row[name])) for row in rows]

        return {name: torch.tensor(padded(name)) for name in rows[0]}
