"""A reward model as one more adapter, with a score head, on the policy's own base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.adapters import add_saved_adapter, using_adapter
from fastppo.models.network import evaluating, last_hidden


def load_reward_adapter(model: Any, source: str, name: str, **hub: Any) -> None:
    """Add a PEFT adapter of a sequence-classification model, frozen, under `name`, and its score head as `model.score`.

    Raises ValueError if the model has no adapter of its own, or the reward adapter no score head.
    """
    if not model.is_peft_model:
        raise ValueError(
            f"reward_adapter={source!r} needs a policy that is an adapter too, so that the base below both stays the "
            "same; pass peft_config=LoraConfig(...)"
        )
    if name in model.pretrained_model.peft_config:
        raise ValueError(f"the model has an adapter named {name!r} already; choose another reward_adapter_name")
    rest = add_saved_adapter(model.pretrained_model, name, source, **hub)
    if len(rest) != 1 or not next(iter(rest)).endswith("score.weight"):
        raise ValueError(
            f"the adapter in {source} has {sorted(rest) or 'nothing'} beside its own weights, expected one score head, "
            "score.weight; train a sequence-classification model with LoraConfig(task_type='SEQ_CLS'), as "
            "RewardTrainer does"
        )
    (weight,) = rest.values()
    model.score = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    model.score.weight.copy_(weight)
    model.score.to(model.device)
    model.reward_adapter, model.reward_adapter_name = source, name


@torch.no_grad()
def reward_scores(model: Any, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Return the scores (B, L, labels), fp32, at every token of input_ids (B, L); the model is left as it was."""
    if model.score is None:
        raise ValueError("the model has no reward adapter; load it with from_pretrained(..., reward_adapter=PATH)")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
    inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with evaluating(model), using_adapter(model.pretrained_model, model.reward_adapter_name):
        hidden = last_hidden(model, use_cache=False, **inputs)
        scores: Tensor = model.score(hidden.to(model.score.weight.dtype)).float()
    return scores
