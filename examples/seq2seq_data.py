"""What examples/seq2seq.py works with: a small T5 and data made by rule, or a model and data by name."""

from argparse import Namespace
from typing import Any

from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from fastppo import AutoModelForSeq2SeqLMWithValueHead
from fastppo.demo import pairs

MADE = {"translation": pairs.translations, "summary": pairs.summaries}
# For a named model: the prompt, the hub's data set and its columns of sources and targets.
NAMED = {
    "translation": (
        "translate English to German: {text}",
        ("Helsinki-NLP/opus-100", "de-en"),
        "translation.{}",
        "en",
        "de",
    ),
    "summary": ("summarize: {text}", ("EdinburghNLP/xsum",), "{}", "document", "summary"),
}


def made(args: Namespace) -> tuple[Any, Any, list[dict[str, str]]]:
    """Return a small T5 after a few supervised steps, its tokenizer, and rows of `prompt` and `references`."""
    rows = [{"prompt": one.source, "references": one.target} for one in MADE[args.task](args.num_rows, args.seed)]
    tokenizer = pairs.new_tokenizer()
    network = pairs.new_model(tokenizer, args.seed)
    taught = [tokenizer(row["prompt"], text_target=row["references"]) for row in rows[args.held_out :]]
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    settings = TrainingArguments(
        args.output_dir,
        per_device_train_batch_size=64,
        max_steps=args.supervised_steps,
        learning_rate=3e-3,
        seed=args.seed,
        **quiet,
    )
    Trainer(network, settings, train_dataset=taught, data_collator=DataCollatorForSeq2Seq(tokenizer, network)).train()
    return AutoModelForSeq2SeqLMWithValueHead(network), tokenizer, rows


def named(args: Namespace) -> tuple[Any, Any, list[dict[str, str]]]:
    """Return a model of the hub, its tokenizer, and rows of the hub's data for its task."""
    from datasets import load_dataset

    template, source, column, text, target = NAMED[args.task]
    data = load_dataset(*source, split="train").flatten().shuffle(seed=args.seed).select(range(args.num_rows))
    names = (column.format(text), column.format(target))
    rows = [{"prompt": template.format(text=row[names[0]]), "references": row[names[1]]} for row in data]
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(args.model_name_or_path)
    return model, AutoTokenizer.from_pretrained(args.model_name_or_path), rows
