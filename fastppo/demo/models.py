"""The demo's three small models, each trained from nothing: tokenizer, language model, reward model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from fastppo.demo.corpus import Review
from fastppo.trainers.reward import RewardConfig, RewardTrainer, text_ids
from fastppo.trainers.sft import SFTConfig, SFTTrainer

VOCAB_SIZE = 1600
MAX_LENGTH = 128
_SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
# No progress bars, nothing written before the end.
_QUIET: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose BOS, EOS and pad are three different tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad = _SPECIAL_TOKENS
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=MAX_LENGTH
    )


def new_language_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama with random weights, some 600,000 of them."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_language_model(
    reviews: Sequence[Review], tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int = 0
) -> LlamaForCausalLM:
    """Teach a new model to write reviews of every tone, and save it in `folder`."""
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        adam_beta2=0.98,
        train_sampling_strategy="group_by_length",
        max_seq_length=MAX_LENGTH,
        seed=seed,
        **_QUIET,
    )
    trainer = SFTTrainer(
        new_language_model(tokenizer, seed),
        args,
        train_dataset=[{"prompt": review.prompt, "completion": review.opinion} for review in reviews],
        processing_class=tokenizer,
    )
    return _trained(trainer)


def train_reward_model(
    language_model: LlamaForCausalLM,
    pairs: Sequence[dict[str, str]],
    held_out: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int = 0,
) -> tuple[LlamaForSequenceClassification, float]:
    """Train a reward model that starts from the language model's trunk; return it with its accuracy on `held_out`."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(LlamaConfig(**{**language_model.config.to_dict(), "num_labels": 1}))
    model.model.load_state_dict(language_model.model.state_dict())
    args = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        num_train_epochs=1,
        learning_rate=1e-3,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        center_rewards_coefficient=0.01,
        max_length=MAX_LENGTH,
        seed=seed,
        **_QUIET,
    )
    trainer = RewardTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer)
    return _trained(trainer), trainer.evaluate()["eval_accuracy"]


class ReviewReward:
    """The reward model's score of prompt and completion as one finished text, the form in which it was trained."""

    def __init__(self, model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return one score per completion, (B,) fp32."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        rows = [{"input_ids": text_ids(text, self.tokenizer)[:MAX_LENGTH]} for text in texts]
        scores: torch.Tensor = self.model(**self.tokenizer.pad(rows, return_tensors="pt")).logits[:, 0]
        return scores


def _trained(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()
