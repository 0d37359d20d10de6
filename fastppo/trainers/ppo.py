"""PPOTrainer: TRL's constructor and methods over the stages of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastppo import controllers, ppo
from fastppo.atomic import Pathlike
from fastppo.config import PPOConfig
from fastppo.core import flatten_dict, set_seed
from fastppo.engine.engine import Engine
from fastppo.engine.stopping import end_ids
from fastppo.models.adapters import without_adapters
from fastppo.models.critic import attach_critic
from fastppo.models.network import causal_lm, to_bf16, verify_head
from fastppo.models.reference import Reference
from fastppo.models.storages import MemoryReport
from fastppo.ops.matmul import row_invariant
from fastppo.rewards import parse_scores
from fastppo.trainers import generation, padded, report, setup, state
from fastppo.trainers.card import create_model_card, model_card
from fastppo.trainers.conclude import conclude
from fastppo.trainers.evaluate import evaluate
from fastppo.trainers.memory import memory_report
from fastppo.trainers.records import Records, is_current
from fastppo.trainers.samples import check_counts, check_samples, limits
from fastppo.trainers.update import optimise
from fastppo.types import Evaluation, Experience, Rollout, Samples


class PPOTrainer:
    """Proximal policy optimisation of a language model with a value head.

    The arguments are those of TRL 0.7 to 0.11: config, a model with a value head, and optionally a reference model
    (by default the same weights with the adapter off, or a frozen copy), a tokenizer, a dataset with its collator for
    `dataloader`, an optimiser, a schedule, and the number of lower layers that policy and reference share.
    Raises ValueError for arguments that cannot work, and RuntimeError in more than one process.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Callable[..., Any] | None = None,
    ):
        config = PPOConfig() if config is None else config
        setup.check_arguments(config, model, ref_model, tokenizer, num_shared_layers, optimizer)
        setup.check_overrides(type(self), PPOTrainer)
        config.check()
        set_seed(config.seed)
        del training_data_collator  # it pads, and nothing is padded here
        self.config, self.tokenizer, self.dataset, self.data_collator = config, tokenizer, dataset, data_collator
        self.accelerator = setup.make_accelerator(config)
        self.current_device = self.accelerator.device
        self._attach(model, ref_model, num_shared_layers)
        self.dataloader = setup.make_dataloader(dataset, data_collator, config, causal_lm(model))
        self.optimizer = optimizer if optimizer is not None else setup.make_optimizer(self.model, config)
        self.lr_scheduler = lr_scheduler or setup.make_scheduler(self.optimizer, config)
        self.has_own_schedule = lr_scheduler is not None
        self.kl_ctl = controllers.make_kl_controller(config)
        self.records = Records(config)
        self.running = controllers.RunningMoments(self.accelerator)
        self.current_step = self.nonfinite_in_a_row = 0
        self.best_score = -math.inf

    def _attach(self, model: Any, ref_model: Any, num_shared_layers: int | None) -> None:
        """Put the models in place: policy, reference, and the engine on the policy's weights."""
        self.model = model if hasattr(model.pretrained_model, "hf_device_map") else model.to(self.current_device)
        if self.config.bf16:
            to_bf16(self.model)
        verify_head(self.model)
        self.is_encoder_decoder, self.is_peft_model = model.is_encoder_decoder, model.is_peft_model
        self.config.is_encoder_decoder, self.config.is_peft_model = self.is_encoder_decoder, self.is_peft_model
        self.reference = Reference(self.model, ref_model, num_shared_layers)
        self.ref_model = self.reference.ref_model
        if self.ref_model is not None:
            self.ref_model.to(self.current_device)
        attach_critic(self.model, self.config)
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.engine = Engine(self.model, self.tokenizer, seed=self.config.seed, consistency=self.config.consistency)
        self.end_ids = end_ids(causal_lm(model), self.tokenizer)
        # Those of the last generate call hold for plain lists of responses.
        self.temperature, self.stop_ids = 1.0, self.end_ids

    # --- generation -------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Generate a response to each query.

        Args:
            query_tensor: one 1-D query, answered by a (1, length) tensor, or a list of them.
            length_sampler: draws max_new_tokens for each query.
            batch_size: accepted and not needed: the engine fills its rows by itself.
            return_prompt: put the query before each response.
            generate_ref_response: return (response, reference response).
            generation_kwargs: transformers' generation arguments, or those of `SamplingConfig`.

        Returns:
            For a list without prompts a `Rollout`, whose records spare `step` a forward pass; else tensors. What an
            encoder reads is never put before a response.
        """
        del batch_size
        kwargs = {"length_sampler": length_sampler, "return_prompt": return_prompt}
        return generation.generate(self, query_tensor, generate_ref_response, kwargs, generation_kwargs)

    # --- one iteration ----------------------------------------------------------------------------------------

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor] | Rollout,
        scores: Sequence[Any] | Tensor,
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Run one PPO iteration on `batch_size` samples; return TRL's statistics.

        Args:
            queries, responses: 1-D int64 tensors. A `Rollout` drawn under the current weights brings its log-probs
                and values along; for any other list they are computed. Responses of an encoder-decoder begin after
                the decoder's start token.
            scores: one number per response; None or NaN leaves a response out.
            response_masks: 1 on the response tokens that are trained on.

        Raises:
            ValueError: anything that cannot be meant, before any work.
            FloatingPointError: too many optimiser steps in a row without a finite gradient.
        """
        clock = report.Clock()
        samples, raw_scores, rollout = self._receive(queries, responses, scores, response_masks)
        with clock("forward_pass"), self._exactness():
            evaluation = self._evaluate(samples, rollout)
        with clock("compute_rewards"):
            processed = self._process(raw_scores, samples)
            rewards, penalties = self._rewards(samples, evaluation, processed)
        with clock("compute_advantages"):
            advantages, returns = self._advantages(samples, evaluation, rewards)
            if self.current_step < self.config.critic_warmup_steps:
                returns = ppo.monte_carlo_returns(rewards, samples.offsets, self.config)
        experience = Experience(samples, evaluation, processed, rewards, penalties, advantages, returns)
        with clock("optimize_step"), self._exactness():
            losses = optimise(self.model, self.optimizer, experience, self.config, self.current_step)
        with clock("calc_stats"):
            rate = self.optimizer.param_groups[0]["lr"]
            stats = report.build_stats(experience, losses, self.kl_ctl.value, rate, self.config)
            stats |= {f"ppo/{name}": value for name, value in self.records.stats(evaluation).items()}
        conclude(self, stats, losses)
        return stats | clock.seconds()

    def _receive(
        self, queries: Sequence[Tensor], responses: Any, scores: Any, masks: Any
    ) -> tuple[Samples, Tensor, Rollout | None]:
        """Check what came in, and decide whether the rollout's records can be believed."""
        check_counts(self.config.batch_size, queries=queries, responses=responses, scores=scores)
        parsed = parse_scores(scores, len(responses))
        rollout = responses if isinstance(responses, Rollout) else None
        temperature = rollout.temperature if rollout is not None else self.temperature
        samples = check_samples(
            queries,
            responses,
            parsed,
            masks,
            **limits(self.model),
            end_ids=self.stop_ids,
            temperature=1.0 if self.config.is_compat else temperature,
            device=self.current_device,
        )
        believed = rollout is not None and is_current(self.model, rollout, queries, samples)
        return samples, parsed[list(samples.rows)].to(self.current_device), rollout if believed else None

    def _evaluate(self, samples: Samples, rollout: Rollout | None) -> Evaluation:
        options: dict[str, Any] = {"max_size": self.config.micro_batch_size, "critic": self.config.critic}
        options["exact_kl"] = self.config.kl_penalty == "full"
        if rollout is None or self.records.check(self.model, samples, rollout, self.current_step):
            return evaluate(self.model, self.reference, samples, rollout, **options)
        return self.records.weigh(evaluate(self.model, self.reference, samples, None, **options), samples, rollout)

    def _exactness(self) -> AbstractContextManager[None]:
        return row_invariant() if self.engine.is_exact else nullcontext()

    def _process(self, scores: Tensor, samples: Samples) -> Tensor:
        if self.config.missing_eos_penalty is not None:
            scores = scores - self.config.missing_eos_penalty * (~samples.ended).to(scores)
        return controllers.process_scores(scores, self.running, self.config)

    def _rewards(self, samples: Samples, evaluation: Evaluation, scores: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.config.kl_penalty
        if not self._overrides("compute_rewards"):
            return ppo.shape_rewards(scores, evaluation, samples.offsets, self.kl_ctl.value, kind)
        mask = padded.mask_of(samples)
        logprobs = padded.to_padded(samples, evaluation.logprobs, 0.0)
        ref_logprobs = padded.to_padded(samples, evaluation.ref_logprobs, 0.0)
        result = self.compute_rewards(scores, logprobs, ref_logprobs, mask.to(scores.device))
        return result[0][mask], result[1][mask]

    def _advantages(self, samples: Samples, evaluation: Evaluation, rewards: Tensor) -> tuple[Tensor, Tensor]:
        if not self._overrides("compute_advantages") and not self.config.is_compat:
            return ppo.estimate_advantages(rewards, evaluation.values, samples.offsets, self.config)
        mask = padded.mask_of(samples).to(rewards.device)
        values, rewards = (padded.to_padded(samples, x, 0.0) for x in (evaluation.values, rewards))
        _, advantages, returns = self.compute_advantages(values, rewards, mask)
        return advantages[mask], returns[mask]

    def _overrides(self, name: str) -> bool:
        return name in vars(self) or getattr(type(self), name) is not getattr(PPOTrainer, name)

    # --- TRL's methods on padded tensors ----------------------------------------------------------------------

    def compute_rewards(self, scores: Any, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor) -> tuple[Any, ...]:
        """Return (rewards, non-score rewards, KLs), (B, L - 1) each; may be overridden."""
        kind = self.config.kl_penalty
        return padded.compute_rewards(scores, logprobs, ref_logprobs, masks, self.kl_ctl.value, kind)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (values, advantages, returns), (B, L - 1) each; may be overridden."""
        return padded.compute_advantages(values, rewards, mask, self.config)

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return (policy loss, weighted value loss, statistics) of padded tensors, (B, L - 1) each; not overridable."""
        new = (logprobs, vpreds, logits)
        pg_loss, vf_loss, nested = padded.loss((old_logprobs, values), new, (advantages, returns), mask, self.config)
        return pg_loss, vf_loss, flatten_dict(nested)

    # --- around the loop --------------------------------------------------------------------------------------

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Any],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send the statistics to the tracker of `log_with`; wandb also gets a table of `columns_to_log`."""
        step = self.current_step - 1  # of the step that the statistics are of
        report.log(self.accelerator, self.config, stats, batch, rewards, columns_to_log, step=step)

    def memory_report(self) -> MemoryReport:
        """Return what lies in memory at the moment, each storage once, by what it is for; print it for a table."""
        return memory_report(self)

    def train(self, prompts: Any, reward: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Generate, score and step until done; see `fastppo.trainers.loop.train` for the arguments."""
        from fastppo.trainers.loop import train

        return train(self, prompts, reward, **kwargs)

    def save_pretrained(self, save_directory: Pathlike, **kwargs: Any) -> None:
        """Save the model (or adapter) with its value head, and the tokenizer."""
        state.save_pretrained(self, save_directory, **kwargs)

    _save_pretrained, create_model_card = save_pretrained, create_model_card

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the model with its value head to the Hugging Face hub, with a card."""
        return self.model.push_to_hub(repo_id, card=model_card(self, repo_id), **kwargs)

    def save_checkpoint(self, directory: Pathlike, **extra: Any) -> Any:
        """Write everything that continuing bit for bit needs; see `fastppo.checkpoint`."""
        return state.save_checkpoint(self, directory, extra)

    def resume_from(self, directory: Pathlike) -> dict[str, Any]:
        """Continue where a checkpoint was written, or where the newest one in a run's folder was."""
        return state.resume_from(self, directory)

    def optional_peft_ctx(self) -> AbstractContextManager[Any]:
        """Switch the adapter off inside the block, if there is one."""
        return without_adapters(self.model.pretrained_model) if self.is_peft_model else nullcontext()
