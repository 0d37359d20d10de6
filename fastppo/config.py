"""The settings: TRL's flat, mutable `PPOConfig`, and the frozen `SamplingConfig` of the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastppo.rules import COMPAT, RULES, SAMPLING_RULES, holds


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`, under TRL's names and with TRL 0.11's defaults.

    It is flat and mutable, as in TRL; `check()` runs when a trainer starts.
    """

    exp_name: str = field(default_factory=lambda: os.path.splitext(os.path.basename(sys.argv[0]))[0])
    """Name of the run in a tracker."""
    seed: int = 0
    """Seed of sampling, shuffling and initialisation."""
    log_with: str | None = None  # wandb, tensorboard or trackio
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "imdb"
    reward_model: str = ""
    remove_unused_columns: bool = True
    """Drop the columns of a dataset that neither the model nor the loop reads."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "fastppo"
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int = 20000
    """Samples, not iterations: TRL's meaning. Only its own loop reads it."""
    learning_rate: float = 1.41e-5
    critic_learning_rate: float | None = None
    """Of the value head, which starts at random, and of a critic of its own; None means learning_rate."""
    lr_scheduler_type: str = "constant"
    """Name of a transformers schedule: constant, linear, cosine, ..."""
    warmup_steps: int = 0  # iterations of linear warm-up
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient towards `target`; otherwise it stays at `init_kl_coef`."""
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    """kl (k1), abs, mse (k2), full (exact, over the vocabulary), or k1, k2, k3."""
    target: float = 6.0
    """Sequence KL, in nats, that the adaptive controller aims at."""
    horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    lam_critic: float | None = None
    """Lambda of the returns that the critic learns; None means `lam`."""
    critic: str = "head"
    """What the value head reads: head, the policy's own hidden states; adapter, those of a second adapter on the same
    base; full, those of a second network."""
    critic_detach: bool = False
    """Keep the value loss from the policy's weights, for critic="head"."""
    critic_warmup_steps: int = 0
    """Iterations at the beginning in which only the critic learns, the discounted sums of the rewards."""
    critic_init: str = "policy"
    """Where a new critic of its own starts: policy, or reward_adapter, whose score head becomes the value head."""
    critic_peft_config: dict[str, Any] = field(default_factory=dict)
    """Fields in which the critic's adapter differs from the policy's, such as {"r": 4}; it starts at random then."""
    cliprange: float = 0.2
    cliprange_high: float | None = None
    """Upper clip of the ratio; None means `cliprange`."""
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss."""
    loss_aggregation: str = "token-mean"
    """token-mean, or sequence-mean: the mean over samples of each sample's token mean."""
    batch_size: int = 128
    """Samples in a step."""
    forward_batch_size: int | None = None
    """TRL's old name of mini_batch_size."""
    mini_batch_size: int = 128
    """Samples in a forward pass of the update, at most."""
    gradient_accumulation_steps: int = 1
    """An optimiser step is taken for every mini_batch_size * gradient_accumulation_steps samples."""
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = None
    """TRL's old name of optimize_device_cache."""
    optimize_device_cache: bool = False
    """Give cached device memory back after every step."""
    early_stopping: bool = False
    target_kl: float = 1.0
    """With early_stopping: end the epochs once a minibatch's approximate KL exceeds 1.5 times this."""
    compare_steps: int = 1
    """Steps between comparisons with the best mean score, for push_to_hub_if_best_kwargs."""
    ratio_threshold: float = 10.0
    """Skip the optimiser step of a minibatch whose mean ratio exceeds this."""
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that does not end in an end-of-sequence token."""
    gradient_checkpointing: bool = False
    """Keep only what enters a layer, and compute the layer again in the backward pass."""
    activation_offload: bool = False
    """On a GPU: keep what the backward pass needs in host memory."""
    consistency: str = "bounded"
    """Recorded log-probs are the update's: bounded (up to rounding, which is measured) or exact (bit for bit)."""
    rescore_every: int = 10
    """Steps between measurements of that rounding on a few responses."""
    importance_cap: float = 2.0
    """Largest importance weight of a token whose recorded log-prob was refused."""
    bf16: bool = False
    """Compute in bf16; the optimiser keeps fp32 masters."""
    optim: str = "adam"
    """adam, adamw_torch, or one of bitsandbytes': adamw_8bit, paged_adamw_32bit, paged_adamw_8bit."""
    weight_decay: float = 0.0
    """Of the optimisers named adamw: the share of a weight, times the learning rate, that each step takes from it."""
    overlong_prompts: str = "error"
    """What `train` does with prompts that do not fit the context: error, drop or truncate (from the left)."""
    max_skipped_steps: int = 5
    """Raise after this many consecutive optimiser steps without a finite gradient."""
    compat: str | None = None
    """"trl-0.7" switches on every old behaviour that was changed since."""
    dataset_num_proc: int | None = None
    world_size: int | None = None
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    backward_batch_size: int | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as one flat dictionary, nested ones with `/` in their names."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Mapping):
                flat.update({f"{name}/{key}": item for key, item in value.items()})
            else:
                flat[name] = value
        return flat

    def check(self) -> None:
        """Raise ValueError, with the value, the expectation and the remedy, if a setting cannot work."""
        self._adopt_old_names()
        for name, is_right, expectation in RULES:
            value = getattr(self, name)
            if not holds(is_right, value) and not (value is None and name in _OPTIONAL):
                raise ValueError(f"PPOConfig.{name} must be {expectation}, got {value!r}")
        if self.weight_decay and "adamw" not in self.optim:
            raise ValueError(
                f"PPOConfig.weight_decay={self.weight_decay!r} has no effect with optim={self.optim!r}; choose "
                "optim='adamw_torch', or leave weight_decay at 0"
            )
        self._check_critic()
        per_step = self.gradient_accumulation_steps
        self.backward_batch_size = self.micro_batch_size * per_step
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"PPOConfig.batch_size ({self.batch_size}) must be a multiple of mini_batch_size * "
                f"gradient_accumulation_steps ({self.micro_batch_size} * {per_step} = {self.backward_batch_size})"
            )
        self.world_size = 1
        self.global_batch_size = self.batch_size
        self.global_backward_batch_size = self.backward_batch_size

    def _check_critic(self) -> None:
        for name, is_useless, remedy in (
            ("critic_detach", self.critic != "head", "critic='head'; another critic leaves the policy's weights alone"),
            ("critic_peft_config", self.critic != "adapter", "critic='adapter'"),
            ("critic_init", self.critic == "head" and self.critic_init != "policy", "critic='adapter' or 'full'"),
            ("critic_init", bool(self.critic_peft_config) and self.critic_init != "policy", "no critic_peft_config"),
        ):
            if is_useless and getattr(self, name):
                raise ValueError(
                    f"PPOConfig.{name}={getattr(self, name)!r} has no effect with critic={self.critic!r} and "
                    f"critic_peft_config={self.critic_peft_config!r}; it needs {remedy}"
                )

    def _adopt_old_names(self) -> None:
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache

    @property
    def micro_batch_size(self) -> int:
        """mini_batch_size, or less where the batch is smaller: TRL 0.11's default of 128 would refuse those."""
        return min(self.mini_batch_size, max(1, self.batch_size // self.gradient_accumulation_steps))

    @property
    def is_compat(self) -> bool:
        """Whether TRL 0.7's old behaviour is asked for."""
        return self.compat == COMPAT


_OPTIONAL = {f.name for f in fields(PPOConfig) if f.default is None}


@dataclass(frozen=True)
class SamplingConfig:
    """How the engine draws tokens. Names and meanings are those of transformers' generation arguments."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """Tokens before an end-of-sequence token may be drawn."""
    do_sample: bool = True  # False takes the most probable token
    temperature: float = 1.0
    top_k: int = 0
    """Draw from the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draw from the smallest set of most probable tokens that has this much probability."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end a response; None takes those of the model's generation config and tokenizer."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response as soon as it contains one; they need a tokenizer."""
    seed: int | None = None
    """Seed of this call's random numbers; None takes the engine's."""

    def __post_init__(self) -> None:
        for name, is_right, expectation in SAMPLING_RULES:
            if not holds(is_right, getattr(self, name)):
                raise ValueError(f"SamplingConfig.{name} must be {expectation}, got {getattr(self, name)!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"SamplingConfig.min_new_tokens must be between 0 and max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens!r}"
            )

    @property
    def is_truncated(self) -> bool:
        """Whether tokens of non-zero probability can be excluded from the draw."""
        return self.do_sample and (self.top_k > 0 or self.top_p < 1.0)

    @classmethod
    def from_generation_kwargs(cls, **kwargs: Any) -> SamplingConfig:
        """Translate transformers' generation arguments; raise ValueError for those that change what is sampled."""
        known = {f.name for f in fields(cls)}
        own: dict[str, Any] = {name: value for name, value in kwargs.items() if name in known and value is not None}
        rest = {name: value for name, value in kwargs.items() if name not in known and value is not None}
        own["top_k"] = int(own.get("top_k", 0))
        own["max_new_tokens"] = int(own.get("max_new_tokens", cls.max_new_tokens))
        own["min_new_tokens"] = max(0, int(own.get("min_new_tokens", 0)))
        eos = rest.pop("eos_token_id", None)
        if eos is not None and own.get("stop_ids") is None:
            own["stop_ids"] = tuple(eos) if hasattr(eos, "__iter__") else (int(eos),)
        if isinstance(own.get("stop_strings"), str):
            own["stop_strings"] = (own["stop_strings"],)
        own["stop_strings"] = tuple(own.get("stop_strings", ()))
        _refuse_unsupported(rest)
        return cls(**own)


# Arguments of `generate` that scripts pass and that change nothing here, with the only values for which that holds.
_WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "pad_token_id": lambda value: True,
    "bos_token_id": lambda value: True,
    "use_cache": lambda value: True,
    "min_length": lambda value: value <= 0,
    "num_beams": lambda value: value == 1,
    "num_return_sequences": lambda value: value == 1,
    "repetition_penalty": lambda value: value == 1.0,
    "no_repeat_ngram_size": lambda value: value == 0,
    "length_penalty": lambda value: value == 1.0,
    "typical_p": lambda value: value == 1.0,
    "return_dict_in_generate": lambda value: not value,
    "output_scores": lambda value: not value,
    "pad_to_multiple_of": lambda value: True,
    "remove_padding": lambda value: True,
}


def _refuse_unsupported(rest: Mapping[str, Any]) -> None:
    for name, value in rest.items():
        if name not in _WITHOUT_EFFECT:
            raise ValueError(f"unknown generation argument {name}={value!r}; known: {sorted(_names_of_arguments())}")
        if not _WITHOUT_EFFECT[name](value):
            raise ValueError(
                f"generation argument {name}={value!r} would sample from another distribution than the one that the "
                "update scores; leave it out, or shape the reward instead (min_new_tokens, top_k and top_p work)"
            )


def _names_of_arguments() -> set[str]:
    return {f.name for f in fields(SamplingConfig)} | set(_WITHOUT_EFFECT) | {"eos_token_id"}
