"""Reward models from pairs of a chosen and a rejected text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, EvalPrediction, TrainingArguments

from fastppo.atomic import write_json
from fastppo.engine.prompts import context_length
from fastppo.reward_models import ADAPTER_FILE, ENDS_WITH_EOS
from fastppo.reward_models import text_ids as text_ids
from fastppo.trainers.supervised import SupervisedTrainer, add_adapter, choose_tokenizer, pin_memory_if_useful

Pair = dict[str, Any]


@dataclass
class RewardConfig(TrainingArguments):
    """Configure a reward model's training: transformers' TrainingArguments and the fields below."""

    max_length: int = field(default=512, metadata={"help": "tokens kept of each text"})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "weight of mean((r_chosen + r_rejected)^2), which keeps rewards around zero"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "stays False: a pair's columns are no arguments of the model's forward"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the pairs, expected False")
        pin_memory_if_useful(self)


class RewardTrainer(SupervisedTrainer):
    """Train a scalar reward model r on rows of `chosen` and `rejected` texts with an optional `margin`.

    L = -mean log σ(r(chosen) - r(rejected) - margin) + c · mean (r(chosen) + r(rejected))²

    `model` has `num_labels=1`; EOS ends every text that is not cut at `max_length` or the model's context. `evaluate`
    reports `eval_accuracy`, in which a tie is no success, and `eval_margin`, the mean difference. With `peft_config` it
    trains an adapter and the score head, and saves what `from_pretrained(..., reward_adapter=...)` of a policy takes.
    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; Touvron et al. 2023 (arXiv:2307.09288) for the margin.
    Raises ValueError for a model with more than one output or rows without the two columns.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        data_collator: Callable[[list[Pair]], dict[str, Tensor]] | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        tokenizer: Any = None,
        *,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        peft_config: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        args = RewardConfig() if args is None else args
        if isinstance(model, str):
            model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        if model.config.num_labels != 1:
            raise ValueError(f"the model has {model.config.num_labels} labels, expected 1; load it with num_labels=1")
        tokenizer = choose_tokenizer(model, tokenizer, processing_class)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = _pad_id(tokenizer)
        setattr(model.config, ENDS_WITH_EOS, True)  # for whoever scores with the trained model
        length = min(args.max_length, context_length(model) or args.max_length)
        super().__init__(
            model=add_adapter(model, None if peft_config is None else replace(peft_config, task_type="SEQ_CLS")),
            args=args,
            data_collator=data_collator or PairPadding(_pad_id(tokenizer)),
            train_dataset=None if train_dataset is None else encode_pairs(train_dataset, tokenizer, length),
            eval_dataset=None if eval_dataset is None else encode_pairs(eval_dataset, tokenizer, length),
            processing_class=tokenizer,
            compute_metrics=compute_metrics or pair_metrics,
            **trainer_arguments,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch of pairs and, if asked for, the rewards (B, 2) of chosen and rejected."""
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
        chosen, rejected = rewards.chunk(2)
        loss = pair_loss(chosen, rejected, inputs.get("margin"), self.args.center_rewards_coefficient or 0.0)
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            write_json(Path(output_dir or self.args.output_dir) / ADAPTER_FILE, {ENDS_WITH_EOS: True})

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss, the rewards (B, 2) and the index 0 (B,) of the chosen text."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, rewards = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)


def pair_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Return the mean loss of rewards (B,) of preferred texts against those of the others (B,), with margins (B,)."""
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(gap).mean() + center_coefficient * (chosen + rejected).square().mean()


def pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of pairs in which the chosen text has strictly more reward, and the mean difference."""
    gap = prediction.predictions[:, 0] - prediction.predictions[:, 1]
    return {"accuracy": float((gap > 0).mean()), "margin": float(gap.mean())}


def encode_pairs(rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[Pair]:
    """Tokenise `chosen` and `rejected`, ended by EOS, to at most `max_length` tokens each; keep `margin`."""
    return [_encode_pair(row, tokenizer, max_length) for row in rows]


def _encode_pair(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> Pair:
    missing = [name for name in ("chosen", "rejected") if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(
            f"a row has columns {sorted(row)}, expected texts in `chosen` and `rejected`; missing: {missing}"
        )
    pair: Pair = {name: text_ids(row[name], tokenizer)[:max_length] for name in ("chosen", "rejected")}
    if row.get("margin") is not None:
        pair["margin"] = float(row["margin"])
    return pair


def _pad_id(tokenizer: Any) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"{type(tokenizer).__name__} has no pad and no EOS token, expected one; set tokenizer.pad_token")


class PairPadding:
    """Collate pairs into one batch: all chosen texts, then all rejected ones, padded on the right."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, pairs: list[Pair]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (2B, S) and, if the pairs have it, `margin` (B,)."""
        texts = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
        longest = max(map(len, texts))
        batch = {
            "input_ids": torch.tensor([ids + [self.pad_id] * (longest - len(ids)) for ids in texts]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]),
        }
        if any("margin" in pair for pair in pairs):
            batch["margin"] = torch.tensor([pair.get("margin", 0.0) for pair in pairs])
        return batch
