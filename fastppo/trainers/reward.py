"""Reward models from pairs of a chosen and a rejected text."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction, TrainingArguments, set_seed

from fastppo.atomic import write_json
from fastppo.models.attach import is_attached
from fastppo.models.fusions import fused
from fastppo.models.loading import adopt_quantised, translate_quantisation
from fastppo.models.network import context_length
from fastppo.models.passes import pass_tokens, passing
from fastppo.models.recompute import recomputing
from fastppo.models.scoring import padded_scores, reads_last_token, scores
from fastppo.reward_models import ADAPTER_FILE, ENDS_WITH_EOS
from fastppo.reward_models import text_ids as text_ids
from fastppo.trainers.pairs import Pair, PairEncoder, Pairs, pairs_side_by_side
from fastppo.trainers.supervised import SupervisedTrainer, add_adapter, choose_tokenizer, pin_memory_if_useful
from fastppo.trainers.token_loss import noisy_embeddings


@dataclass
class RewardConfig(TrainingArguments):
    """Configure a reward model's training: transformers' TrainingArguments and the fields below."""

    max_length: int | None = field(
        default=512, metadata={"help": "tokens kept of each text, the first; None: as many as the model has room for"}
    )
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
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        pin_memory_if_useful(self)


class RewardTrainer(SupervisedTrainer):
    """Train a scalar reward model r on pairs of a `chosen` and a `rejected` text, with an optional `margin`.

    L = mean over pairs of -log σ(r(chosen) - r(rejected) - margin) + c · (r(chosen) + r(rejected))²

    The mean is over all pairs of an optimiser step, whose texts run side by side, without padding where the model
    allows it. `model` is a name or a sequence-classification model with `num_labels=1`. Rows hold texts or chats, after
    a `prompt` of the same kind if there is one, or TRL's four columns of token ids. Of each text the first `max_length`
    tokens are kept, at most the model's context; EOS ends those that are not cut, unless it is the padding token too,
    which such models do not read. `evaluate` reports `eval_accuracy`, in which a tie is no success, and `eval_margin`,
    the mean difference. With `peft_config` an adapter and the score head are trained, and saved as what
    `from_pretrained(..., reward_adapter=...)` of a policy takes.
    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; Touvron et al. 2023 (arXiv:2307.09288) for the margin.
    Raises ValueError for a model with more than one output and for rows that are no pairs.
    """

    loss_is_scaled_for_ga = True  # of transformers that know it; older ones ask whether the model takes loss arguments

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Pair]], Mapping[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        *,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        peft_config: Any = None,
        max_length: int | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        settings = _settle(args, max_length)
        set_seed(settings.seed)  # a new score head and a new adapter start at random
        model = _load(model, model_init_kwargs or {})
        if model.config.num_labels != 1:
            raise ValueError(f"the model has {model.config.num_labels} labels, expected 1; load it with num_labels=1")
        tokenizer = choose_tokenizer(model, tokenizer, processing_class)
        encoder = _make_encoder(model, tokenizer, settings.max_length)
        self._losses: list[Tensor] = []  # of the batches that were evaluated last, summed, beside their sizes
        super().__init__(
            model=add_adapter(model, None if peft_config is None else replace(peft_config, task_type="SEQ_CLS")),
            args=settings,
            data_collator=data_collator or pairs_side_by_side,
            train_dataset=_prepare(train_dataset, encoder),
            eval_dataset=_prepare(eval_dataset, encoder),
            processing_class=tokenizer,
            compute_metrics=compute_metrics or pair_metrics,
            **trainer_arguments,
        )
        self.model_accepts_loss_kwargs = True
        # transformers' own hook takes all texts of a batch for one.
        self.noise_alpha, self.neftune_noise_alpha = settings.neftune_noise_alpha, None
        self.reads_last_token = reads_last_token(self.model)

    @contextmanager
    def _laid_out(self) -> Iterator[None]:
        """Run the model on texts side by side inside, or padded where it needs that, backward passes included."""
        with fused(self.model), recomputing(self.model):
            if not self.reads_last_token:
                yield
            else:
                with passing(self.model):
                    yield

    def _parts(self, inputs: Any) -> Iterator[Pairs]:
        """Yield the batch in parts of as many tokens as a pass should have; runs inside `_laid_out`."""
        device = torch.device(self.args.device)
        return Pairs.of(self._prepare_inputs(inputs)).parts(is_attached(self.model), pass_tokens(device))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of one batch of pairs, pass by pass; return its part of the loss, ()."""
        count = len(Pairs.of(inputs)) if num_items_in_batch is None else num_items_in_batch
        model.train()
        total = torch.zeros((), device=self.args.device)
        with self._laid_out():
            for part in self._parts(inputs):
                total += super().training_step(model, part.batch(), count)
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, divided by the pairs of the optimiser step or its own, and rewards (B, 2) too."""
        pairs = Pairs.of(inputs)
        texts = [*pairs.chosen, *pairs.rejected]
        noise = noisy_embeddings(self.model, texts, self.noise_alpha)
        with self._laid_out(), self.accelerator.autocast(), noise:
            score = scores if self.reads_last_token else padded_scores
            chosen, rejected = score(self.model, texts)[:, 0].chunk(2)
        coefficient = getattr(self.args, "center_rewards_coefficient", None) or 0.0
        loss = pair_loss(chosen, rejected, pairs.margins, coefficient)
        if num_items_in_batch is not None:
            loss = loss * (len(pairs) / num_items_in_batch)
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int | None:
        return sum(len(Pairs.of(batch)) for batch in batch_samples) or None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers does, with the mean loss over all pairs instead of over batches of any size."""
        self._losses = []
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self._losses and name in output.metrics:
            total, pairs = torch.stack(self._losses).sum(0).tolist()
            output.metrics[name] = total / pairs
        return output

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss, the rewards (B, 2) and the index 0 (B,) of the chosen text."""
        loss, rewards = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._losses.append(torch.stack([loss * len(rewards), loss.new_tensor(len(rewards))]).double().cpu())
        if prediction_loss_only:
            return loss, None, None
        return loss, rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            ends = {ENDS_WITH_EOS: getattr(self.model.config, ENDS_WITH_EOS)}
            write_json(Path(output_dir or self.args.output_dir) / ADAPTER_FILE, ends)


def _load(model: Any, options: dict[str, Any]) -> Any:
    """Return a model given by itself, or by its name or directory."""
    if isinstance(model, (str, os.PathLike)):
        return load_classifier(os.fspath(model), options)
    if options:
        raise ValueError(f"model_init_kwargs={options} are for a model given by its name, got {type(model).__name__}")
    return model


def load_classifier(name: str, options: dict[str, Any]) -> Any:
    """Load a sequence-classification model with one label, fp32 unless the options say otherwise.

    In 8 or 4 bits, the score head stays as it is: it is trained, and is no weight for the quantised layers' kernels.
    """
    from transformers import AutoModelForSequenceClassification

    if options.get("load_in_8bit") or options.get("load_in_4bit"):
        options = {"llm_int8_skip_modules": ["score"], **options}
    options = translate_quantisation({"dtype": torch.float32, "num_labels": 1, **options})
    model = AutoModelForSequenceClassification.from_pretrained(name, **options)
    adopt_quantised(model)
    return model


def _settle(args: TrainingArguments | None, max_length: int | None) -> Any:
    """Return a copy of the arguments with what the trainer itself was given, and columns that stay."""
    settings: Any = RewardConfig() if args is None else copy.copy(args)
    settings.remove_unused_columns = False
    settings.max_length = getattr(settings, "max_length", 512) if max_length is None else max_length
    pin_memory_if_useful(settings)
    return settings


def _make_encoder(model: Any, tokenizer: Any, max_length: int | None) -> PairEncoder:
    """Return the encoder, and note in the model's configuration what whoever scores with it has to know."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _pad_id(tokenizer)
    adds_eos = tokenizer.eos_token_id != model.config.pad_token_id
    setattr(model.config, ENDS_WITH_EOS, adds_eos)
    limits = [limit for limit in (max_length, context_length(model)) if limit is not None]
    return PairEncoder(tokenizer, min(limits, default=tokenizer.model_max_length), adds_eos)


def _prepare(dataset: Any, encoder: PairEncoder) -> Any:
    """Encode a dataset, or each of several given by name."""
    if isinstance(dataset, dict):
        return {name: _prepare(part, encoder) for name, part in dataset.items()}
    return None if dataset is None else encoder.encode(dataset)


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


def _pad_id(tokenizer: Any) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"{type(tokenizer).__name__} has no pad and no EOS token, expected one; set tokenizer.pad_token")
