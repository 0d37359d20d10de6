"""Supervised fine-tuning on texts, on prompts with completions, and on chats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from fastppo.models.attach import is_attached
from fastppo.models.fusions import fused
from fastppo.models.loading import load_base
from fastppo.models.network import context_length, is_encoder_decoder, verify_head
from fastppo.models.passes import pass_tokens, passing
from fastppo.models.recompute import recomputing
from fastppo.trainers.completions import DataCollatorForCompletionOnlyLM
from fastppo.trainers.documents import Corpus, Documents, Row, side_by_side
from fastppo.trainers.encoding import Encoder
from fastppo.trainers.sft_config import LONGEST_BY_DEFAULT, SFTConfig, settle
from fastppo.trainers.supervised import SupervisedTrainer, add_adapter, choose_tokenizer, save_model
from fastppo.trainers.token_loss import token_loss

__all__ = ["SFTConfig", "SFTTrainer"]


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a causal language model on the tokens of documents, each seen alone, without padding and logits.

    `model` is a name, a directory, a transformers or PEFT model, or one with a value head, which stays as it is. A
    dataset is a `datasets.Dataset`, a sequence or a stream of dicts with a text column, with `prompt` and `completion`
    (only the completion is learned), with a chat in `messages`, or with ready `input_ids` and optional `labels`;
    `formatting_func` makes the texts itself, of one row or of a dict of columns. SFTConfig's own fields may be given
    here too, and then take precedence over `args`. The loss is the mean over all tokens that an optimiser step learns.
    Raises ValueError if rows have none of these columns or leave nothing to learn, NotImplementedError for a model
    whose head is more than a linear layer.
    """

    loss_is_scaled_for_ga = True  # of transformers that know it; older ones ask whether the model takes loss arguments
    control: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Row]], Mapping[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        **more: Any,
    ) -> None:
        settings, trainer_arguments = settle(args, more)
        _refuse_logits(trainer_arguments)
        set_seed(settings.seed)  # a new adapter starts at random
        model = _load(model, settings.model_init_kwargs or {}, peft_config)
        self.whole_model = model  # what is saved: a value head too
        network = getattr(model, "pretrained_model", model)
        _refuse_encoder(network)
        tokenizer = choose_tokenizer(network, tokenizer, processing_class)
        answers = data_collator if isinstance(data_collator, DataCollatorForCompletionOnlyLM) else None
        encoder = make_encoder(settings, network, tokenizer, formatting_func, answers, more.get("dataset_text_field"))
        is_prepared = bool((settings.dataset_kwargs or {}).get("skip_prepare_dataset"))
        eval_packing = settings.packing if settings.eval_packing is None else settings.eval_packing
        super().__init__(
            model=network,
            args=settings,
            data_collator=data_collator if is_prepared and data_collator else _collator(data_collator),
            train_dataset=train_dataset if is_prepared else prepare(train_dataset, encoder, settings.packing),
            eval_dataset=eval_dataset if is_prepared else prepare(eval_dataset, encoder, eval_packing),
            processing_class=tokenizer,
            **trainer_arguments,
        )
        self.model_accepts_loss_kwargs = True
        # transformers' own hook takes a packed row for one document.
        self.noise_alpha, self.neftune_noise_alpha = settings.neftune_noise_alpha, None
        verify_head(network)

    @contextmanager
    def _laid_out(self) -> Iterator[None]:
        """Run the model on documents side by side inside, or padded where it needs that, backward passes included."""
        with fused(self.model), recomputing(self.model), passing(self.model):
            yield

    def _parts(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Yield the batch in parts of as many tokens as a pass should have; runs inside `_laid_out`."""
        device = torch.device(self.args.device)
        return Documents.of(self._prepare_inputs(inputs)).parts(is_attached(self.model), pass_tokens(device))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of one batch, pass by pass; return its part of the loss, ()."""
        count = Documents.of(inputs).count if num_items_in_batch is None else num_items_in_batch
        model.train()
        total = torch.zeros((), device=self.args.device)
        with self._laid_out():
            for part in self._parts(inputs):
                total += super().training_step(model, part, count)
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch, divided by the tokens of the optimiser step, or by the batch's own."""
        documents = Documents.of(inputs)
        count = documents.count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        with self._laid_out(), self.accelerator.autocast():
            loss = token_loss(self.model, documents, count.clamp(min=1).to(self.args.device), self.noise_alpha)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        counts = [Documents.of(batch).count.to(device) for batch in batch_samples]
        return torch.stack(counts).sum() if counts else None

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Measure the mean loss over all tokens to learn; with `compute_metrics`, do as transformers does."""
        if not prediction_loss_only or self.args.bf16_full_eval or self.args.fp16_full_eval:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        self.model.eval()
        total, tokens, documents = 0.0, 0, 0
        for batch in dataloader:
            whole = Documents.of(batch)
            loss, _, _ = self.prediction_step(self.model, batch, prediction_loss_only=True)
            total, tokens = total + float(loss * whole.count), tokens + int(whole.count)
            documents += len(whole.tokens)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        prefix = kwargs.get("metric_key_prefix", "eval")
        return EvalLoopOutput(None, None, {f"{prefix}_loss": total / max(tokens, 1)}, documents)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the mean loss of a batch and, for `compute_metrics`, logits (B, S, V) and labels (B, S), padded."""
        documents = Documents.of(inputs)
        loss = torch.zeros((), device=self.args.device)
        with self._laid_out():
            for part in self._parts(inputs):
                loss += self.compute_loss(model, part, num_items_in_batch=documents.count)
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(documents.padded())
        with self.accelerator.autocast():
            logits = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return loss, logits, inputs["labels"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_model(self.whole_model, self.processing_class, output_dir or self.args.output_dir, state_dict)


def _load(model: Any, options: dict[str, Any], peft_config: Any) -> Any:
    """Return a model given by itself or by its name, with a new adapter if a configuration is given."""
    if isinstance(model, (str, os.PathLike)):
        return load_base(model, peft_config=peft_config, **options).model
    if options:
        raise ValueError(f"model_init_kwargs={options} are for a model given by its name, got {type(model).__name__}")
    return add_adapter(model, peft_config)


def _refuse_encoder(model: Any) -> None:
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder alone would be trained, expected a causal "
            "model; fine-tune it with transformers' Seq2SeqTrainer"
        )


def _collator(given: Any) -> Any:
    """Return what collates rows whose labels are made already, instead of collators that would make them."""
    if isinstance(given, DataCollatorForLanguageModeling) and given.mlm:
        raise ValueError("data_collator masks tokens (mlm=True), expected mlm=False, or no data_collator")
    makes_labels = isinstance(given, (DataCollatorForLanguageModeling, DataCollatorForCompletionOnlyLM))
    return side_by_side if given is None or makes_labels else given


def _refuse_logits(trainer_arguments: Mapping[str, Any]) -> None:
    if trainer_arguments.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func reads logits, which are never made; override compute_loss instead")


def make_encoder(
    settings: Any, model: Any, tokenizer: Any, formatting_func: Any, answers: Any, given_field: str | None
) -> Encoder:
    """Return the encoder that the settings ask for; a column that was named to the trainer itself goes first."""
    length = settings.max_seq_length or settings.max_length or _default_length(model, tokenizer)
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(f"max_seq_length={length}, but the model has {context} positions; lower it to {context}")
    return Encoder(
        tokenizer,
        length,
        settings.dataset_text_field,
        given_field is not None,
        formatting_func,
        settings.completion_only_loss,
        settings.assistant_only_loss,
        answers,
        (settings.dataset_kwargs or {}).get("add_special_tokens", True),
        settings.dataset_batch_size,
    )


def _default_length(model: Any, tokenizer: Any) -> int:
    """Return the tokens of a row that tokenizer and model both have room for."""
    length: int = min(tokenizer.model_max_length, context_length(model) or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)
    return length


def prepare(dataset: Any, encoder: Encoder, packed: bool) -> Any:
    """Encode a dataset, or each of several given by name, and pack it if asked to; a stream when it is read."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: prepare(part, encoder, packed) for name, part in dataset.items()}
    if not hasattr(dataset, "__len__"):
        return Stream(dataset, encoder, packed)
    rows = dataset if hasattr(dataset, "__iter__") else (dataset[index] for index in range(len(dataset)))
    corpus = encoder.encode(rows)
    return corpus.pack(encoder.max_length) if packed else corpus


class Stream(torch.utils.data.IterableDataset[Row]):
    """A dataset without a length, encoded as it is read and packed by the `encoder.batch_size` rows."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], encoder: Encoder, packed: bool):
        self.rows, self.encoder, self.packed = rows, encoder, packed

    def __iter__(self) -> Iterator[Row]:
        documents = filter(None, self.encoder.documents(self.rows))
        while window := list(islice(documents, self.encoder.batch_size)):
            corpus = Corpus(window)
            if self.packed:
                corpus.pack(self.encoder.max_length)
            yield from (corpus[index] for index in range(len(corpus)))
