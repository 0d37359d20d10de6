"""AdamW of bitsandbytes: moments in 8 bits, or in pages that go to host memory when the GPU's runs short."""

from __future__ import annotations

from typing import Any

import torch

from fastppo.config import PPOConfig


def make_compact_adamw(groups: list[dict[str, Any]], config: PPOConfig) -> torch.optim.Optimizer:
    """Return the optimiser that `config.optim` names, over groups of parameters.

    Moments of weights with fewer than 4,096 numbers stay fp32, and out of the pages those of fewer than 100,000.
    Raises ValueError for weights that it cannot train as well as Adam would.
    """
    from bitsandbytes.optim import AdamW

    parameters = [parameter for group in groups for parameter in group["params"]]
    low = sum(p.numel() for p in parameters if p.dtype in (torch.bfloat16, torch.float16))
    if low:
        raise ValueError(
            f"PPOConfig.optim={config.optim!r} keeps no fp32 masters, and {low:,} of the trained numbers have 16 bits, "
            "in which small updates are lost; train an adapter (peft_config), fp32 weights, or use optim='adam'"
        )
    is_paged = config.optim.startswith("paged")
    if is_paged and any(p.device.type != "cuda" for p in parameters):
        raise ValueError(
            f"PPOConfig.optim={config.optim!r} pages between a GPU and its host, but the model is on "
            f"{parameters[0].device}; choose 'adamw_8bit' for small moments, 'adam' or 'adamw_torch'"
        )
    options: dict[str, Any] = {"optim_bits": 8 if config.optim.endswith("8bit") else 32, "is_paged": is_paged}
    _check_served(AdamW, options, parameters[0].device)
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer = AdamW(groups, **settings, **options)
    return optimizer


def _check_served(kind: Any, options: dict[str, Any], device: torch.device) -> None:
    """Take one step for nothing: not every bitsandbytes has the kernels for every device, and says so only then."""
    trial = torch.nn.Parameter(torch.zeros(4096, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        kind([trial], **options).step()
    except Exception as error:
        from bitsandbytes import __version__

        raise ValueError(
            f"bitsandbytes {__version__} cannot take such steps on {device} ({error}); upgrade it, or choose "
            "optim='adam' or 'adamw_torch'"
        ) from error
