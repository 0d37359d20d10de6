"""The two networks of examples/film_reviews.py, each trained from nothing and saved in a folder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from film_data import Row

from fastppo import SFTConfig, SFTTrainer
from fastppo.demo.models import train_tokenizer

MAX_LENGTH = 96
_ALIKE: dict[str, Any] = {
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "train_sampling_strategy": "group_by_length",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}


def train_language_model(rows: list[Row], folder: Path, epochs: int, vocabulary: int, seed: int) -> None:
    """Make a tokenizer and a Llama of some 1.2 million weights that writes reviews."""
    tokenizer = train_tokenizer((row["text"] for row in rows), vocabulary)
    settings = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.03,
        **_special_tokens(tokenizer),
    )
    torch.manual_seed(seed)
    texts = [row["text"] for row in rows]
    fine_tune(
        transformers.LlamaForCausalLM(settings), tokenizer, texts, folder, seed, epochs=epochs, learning_rate=3e-3
    )


def fine_tune(
    model: Any, tokenizer: Any, texts: list[str], folder: Path, seed: int, epochs: int = 1, learning_rate: float = 1e-3
) -> Any:
    """Train a language model on texts, save it in `folder` and return it."""
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        max_seq_length=MAX_LENGTH,
        seed=seed,
        **_ALIKE,
    )
    data = [{"text": text} for text in texts]
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def train_classifier(written: Path, rows: list[Row], folder: Path, epochs: int, seed: int) -> None:
    """Train one layer of ModernBERT, averaged over the tokens, to tell praise (logit above 0) from blame.

    Its word vectors begin as those of the language model in `written`, which has read more.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    vectors = transformers.AutoModel.from_pretrained(written).get_input_embeddings().weight.detach()
    settings = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=vectors.shape[1],
        intermediate_size=2 * vectors.shape[1],
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        embedding_dropout=0.4,  # five thousand sentences are soon known by heart
        classifier_dropout=0.4,
        classifier_pooling="mean",
        num_labels=1,
        problem_type="multi_label_classification",  # so that one logit is trained with the binary cross-entropy
        cls_token_id=tokenizer.bos_token_id,
        sep_token_id=tokenizer.eos_token_id,
        **_special_tokens(tokenizer),
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        weight_decay=0.1,
        seed=seed,
        **_ALIKE,
    )
    torch.manual_seed(seed)
    model = transformers.ModernBertForSequenceClassification(settings)
    model.get_input_embeddings().weight.data.copy_(0.05 * vectors / vectors.std())
    encoded = [tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH) for row in rows]
    data = [{**ids, "labels": [float(row["label"])]} for ids, row in zip(encoded, rows, strict=True)]
    transformers.Trainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
