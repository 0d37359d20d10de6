"""The truth that recorded log-probs are held to: one full forward of plain transformers in fp32 for each sequence."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(model_dir: str, dtype: str = "fp32") -> Any:
    """Load the model with its weights rounded to `dtype`, to compute in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype]).float().eval()


@torch.no_grad()
def logprobs(model: Any, prompts: Iterable[Any], responses: Iterable[Any]) -> list[Tensor]:
    """Return the log-prob of every token of every response, at temperature 1: one 1-D fp32 tensor for each."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        drawn = torch.as_tensor(response)
        ids = torch.cat([torch.as_tensor(prompt), drawn])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0])
    return found


def gaps(model: Any, prompts: Iterable[Any], responses: Iterable[Any], recorded: Iterable[Any]) -> dict[str, float]:
    """Return the largest and the mean difference of the recorded log-probs to the recomputed ones."""
    expected = torch.cat(logprobs(model, prompts, responses)).double()
    difference = (torch.cat([torch.as_tensor(each).double() for each in recorded]) - expected).abs()
    return {"max": float(difference.max()), "mean": float(difference.mean())}
