"""What a trainer is made of: checks of its arguments, device and trackers, optimiser, schedule, data."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from fastppo.config import PPOConfig
from fastppo.models.critic import critic_parameters
from fastppo.models.value_head import PreTrainedModelWrapper
from fastppo.trainers.compact import make_compact_adamw
from fastppo.trainers.masters import MasterAdam

HONOURED_OVERRIDES = ("compute_rewards", "compute_advantages", "log_stats")
# Stages of TRL's trainer that have no counterpart here: an override would be silently without effect.
_TRL_STAGES = (
    "batched_forward_pass",
    "train_minibatch",
    "loss",
    "record_step_stats",
    "gather_stats",
    "prepare_dataloader",
    "prepare_model_inputs",
    "_kl_penalty",
    "_early_stop",
    "_step_safety_checker",
    "_generate_batched",
)


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, num_shared_layers: int | None, optimizer: Any = None
) -> None:
    """Raise ValueError for arguments of the wrong kind."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, got {type(config).__name__}")
    if not isinstance(model, PreTrainedModelWrapper):
        raise ValueError(
            f"model must be an AutoModelForCausalLMWithValueHead, got {type(model).__name__}; "
            "wrap it with AutoModelForCausalLMWithValueHead.from_pretrained(model), or an encoder-decoder with "
            "AutoModelForSeq2SeqLMWithValueHead"
        )
    if model.is_encoder_decoder and config.is_compat:
        raise ValueError(
            f"compat={config.compat!r} would leave the first token of every response of an encoder-decoder without "
            "reward and gradient, as TRL did; leave compat out"
        )
    if config.bf16 and optimizer is not None:
        raise ValueError(
            f"PPOConfig.bf16=True came with an optimizer ({type(optimizer).__name__}), which has no fp32 masters for "
            "bf16 weights; leave the optimizer out, or pass fastppo.trainers.masters.MasterAdam and a bf16 model"
        )
    if config.optim != "adam" and optimizer is not None:
        raise ValueError(
            f"PPOConfig.optim={config.optim!r} came with an optimizer ({type(optimizer).__name__}); leave out either"
        )
    if config.critic != "head" and optimizer is not None:
        raise ValueError(
            f"PPOConfig.critic={config.critic!r} came with an optimizer ({type(optimizer).__name__}), made before the "
            "critic that it would have to train; leave the optimizer out"
        )
    if ref_model is not None and not hasattr(ref_model, "parameters"):
        raise ValueError(f"ref_model must be a model or None, got {type(ref_model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    if ref_model is not None and num_shared_layers is not None:
        warnings.warn("num_shared_layers is ignored because a ref_model was passed", UserWarning, stacklevel=3)


def check_overrides(trainer: type, base: type) -> None:
    """Raise TypeError if a subclass overrides a stage whose override would have no effect."""
    own_stages = [name for name in vars(base) if name.startswith("_") and not name.startswith("__")]
    names = {
        name for parent in trainer.__mro__ if issubclass(parent, base) and parent is not base for name in vars(parent)
    }
    useless = sorted(names.intersection([*_TRL_STAGES, *own_stages]))
    if useless:
        raise TypeError(
            f"{trainer.__name__} overrides {', '.join(useless)}, which fastppo would never call; overrides of "
            f"{', '.join(HONOURED_OVERRIDES)} are honoured, fastppo.ops and fastppo.ppo hold the stages as functions"
        )


def make_accelerator(config: PPOConfig) -> Any:
    """Return accelerate's Accelerator: the device, and the tracker that `log_with` names."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"fastppo runs in one process for now, got WORLD_SIZE={os.environ['WORLD_SIZE']}; start it with python"
        )
    options = dict(config.accelerator_kwargs)
    if torch.backends.mps.is_available():  # the random numbers are fp64, which Apple's GPUs do not have
        options.setdefault("cpu", True)
    project = dict(config.project_kwargs)
    if config.log_with == "tensorboard":
        project.setdefault("logging_dir", "logs")
    accelerator = Accelerator(log_with=config.log_with, project_config=ProjectConfiguration(**project), **options)
    if config.activation_offload and accelerator.device.type != "cuda":
        raise ValueError(
            "PPOConfig.activation_offload=True moves activations from a GPU to its host, but this run is on "
            f"{accelerator.device}, where they are already; use gradient_checkpointing=True to keep fewer"
        )
    if accelerator.mixed_precision != "no":
        warnings.warn(
            f"mixed_precision={accelerator.mixed_precision!r} is not applied; PPOConfig(bf16=True) computes in bf16",
            stacklevel=3,
        )
    if config.log_with is not None:
        simple = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers(config.tracker_project_name, config=simple, init_kwargs=config.tracker_kwargs)
    return accelerator


def make_optimizer(model: Any, config: PPOConfig) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters that `config.optim` names.

    Adam is fused where the device has it, and keeps fp32 masters of half-precision weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter; load it with is_trainable=True, or add a peft_config")
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if config.critic_learning_rate is not None:
        critic = {id(p) for p in critic_parameters(model)}
        groups = [
            {"params": [p for p in parameters if id(p) not in critic]},
            {"params": [p for p in parameters if id(p) in critic], "lr": config.critic_learning_rate},
        ]
    groups = [group for group in groups if group["params"]]
    if config.optim.endswith("bit"):
        return make_compact_adamw(groups, config)
    settings: dict[str, Any] = {"lr": config.learning_rate}
    if config.optim == "adamw_torch":
        settings |= {"weight_decay": config.weight_decay, "decoupled_weight_decay": True}
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        return MasterAdam(groups, **settings)
    return torch.optim.Adam(groups, fused=fused, **settings)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: PPOConfig, iterations: int | None = None, done: int = 0
) -> Any:
    """Return the schedule that the settings name, one step per iteration, over `iterations` or TRL's `steps`.

    `done` iterations of it are over already.
    """
    if config.lr_scheduler_type == "constant" and config.warmup_steps == 0:
        return None
    from transformers import get_scheduler

    name = config.lr_scheduler_type
    if name == "constant":
        name = "constant_with_warmup"
    total = iterations or math.ceil(config.steps / config.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    schedule = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total)
    for _ in range(done):
        schedule.step()
    return schedule


class EpochSampler(Sampler[int]):
    """Shuffles a dataset by (seed, epoch), and can start anywhere: the cursor of a checkpoint."""

    def __init__(self, size: int, seed: int, batch_size: int):
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.epoch = self.drawn = 0

    def order(self) -> list[int]:
        """Return the order of the current epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        whole = self.size - self.size % self.batch_size
        for index in self.order()[self.drawn :]:
            self.drawn += 1
            yield index
            if self.drawn == whole:
                break
        self.epoch, self.drawn = self.epoch + 1, 0

    def __len__(self) -> int:
        return self.size


def make_dataloader(dataset: Any, collator: Any, config: PPOConfig, model: Any) -> DataLoader[Any] | None:
    """Return a shuffling loader of whole batches, or None without a dataset."""
    if dataset is None:
        return None
    if hasattr(dataset, "column_names") and config.remove_unused_columns:
        known = set(inspect.signature(model.forward).parameters) | {"label", "query", "response"}
        dataset = dataset.remove_columns([name for name in dataset.column_names if name not in known])
    if len(dataset) < config.batch_size:
        warnings.warn(
            f"the dataset has {len(dataset)} rows, fewer than batch_size={config.batch_size}: the dataloader is empty; "
            "lower batch_size or add rows",
            stacklevel=3,
        )
    sampler = EpochSampler(len(dataset), config.seed, config.batch_size)
    return DataLoader(dataset, batch_size=config.batch_size, sampler=sampler, collate_fn=collator, drop_last=True)
