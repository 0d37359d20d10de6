"""The card of a model that PPO has trained: written where it is asked for, and never sent anywhere by itself."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastppo.atomic import Pathlike, atomic_files
from fastppo.config import PPOConfig
from fastppo.models.network import causal_lm

_TEXT = """---
{metadata}
---

# {name}

Trained by PPO with fastppo {version}: {steps} steps of {batch_size} samples, from {base}.

Settings that are not fastppo's defaults:

{settings}

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}")
```

With its value head: `fastppo.{auto_class}WithValueHead.from_pretrained("{name}")`.
"""


def model_card(trainer: Any, name: str) -> str:
    """Return the text of a card, Markdown with the hub's metadata on top; `name` is the model's on the hub."""
    from huggingface_hub import ModelCardData

    config, base = trainer.config, causal_lm(trainer.model).config.name_or_path
    on_hub = bool(base) and base.count("/") <= 1 and not Path(base).exists()
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if trainer.is_peft_model else "transformers",
        pipeline_tag="text2text-generation" if trainer.is_encoder_decoder else "text-generation",
        tags=["fastppo", "ppo", "reinforcement-learning"],
    )
    return _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        version=version("fastppo"),
        steps=trainer.current_step,
        batch_size=config.batch_size,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else "weights that are not on the hub",
        settings=_settings(config),
        auto_class=f"AutoModelFor{'Seq2Seq' if trainer.is_encoder_decoder else 'Causal'}LM",
    )


def create_model_card(trainer: Any, path: Pathlike, model_name: str = "fastppo model") -> None:
    """Write the card as README.md into a folder."""
    with atomic_files(path) as folder:
        (folder / "README.md").write_text(model_card(trainer, model_name), encoding="utf-8")


# They say where a run was, not how it was trained.
_PLACES = {
    "model_name",
    "query_dataset",
    "reward_model",
    "exp_name",
    "task_name",
    "is_encoder_decoder",
    "is_peft_model",
}


def _settings(config: PPOConfig) -> str:
    fields = [field for field in dataclasses.fields(config) if field.name not in _PLACES]
    given = {field.name: (getattr(config, field.name), field.default) for field in fields}
    lines = [
        f"- {name}: {value}"
        for name, (value, default) in given.items()
        if isinstance(value, (bool, int, float, str)) and value != default and not name.startswith("is_")
    ]
    return "\n".join(lines) or "none."
