"""Adam for weights that are computed with in bf16: each keeps an fp32 master, which the updates are added to.

A bf16 weight cannot take an update below 1/256 of itself, which is what most updates are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

# Weights that are updated at a time: an fp32 copy of their gradients exists meanwhile, and stays in a CPU's cache.
_AT_A_TIME = {"cpu": 2**20, "cuda": 2**24}


class MasterAdam(torch.optim.Optimizer):
    """Adam as torch defines it on fp32 masters; weights are the masters rounded, and gradients may be of any dtype.

    Weights that are fp32 are their own masters. With decoupled weight decay it is AdamW. `found_inf`, a () tensor that
    gradient scalers set, leaves everything as it was where it is not 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, settings | {"decoupled_weight_decay": decoupled_weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update masters and weights from the gradients."""
        if closure is not None:
            raise ValueError("MasterAdam takes no closure: call backward first")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))  # all at once: memory may run out on the way, or a user interrupt
        assert parameter.grad is not None
        wholes = state.get("master", parameter), parameter.grad, state["exp_avg"], state["exp_avg_sq"], parameter
        for master, gradient, mean, square, weight in zip(*map(_slices, wholes), strict=True):
            step = state["step"].clone()  # the same one for every slice
            # torch's fused kernel takes all its arguments to lie alike, and an fp32 weight may lie transposed.
            updated = master.contiguous()
            self._adam(updated, gradient.float().contiguous(), mean, square, step, group)
            if "master" in state or updated is not master:
                weight.copy_(updated)
        state["step"].copy_(step)

    def _adam(
        self, master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        adam(
            [master], [gradient], [mean], [square], [], [step],
            lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False, maximize=False, fused=True, found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch would round it to the dtype of the weights."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, entries in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {name: value.to(parameter.device).clone() for name, value in entries.items()}


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    mean, square = torch.zeros(2, *parameter.shape, device=parameter.device).unbind()
    state = {"step": torch.zeros((), device=parameter.device), "exp_avg": mean, "exp_avg_sq": square}
    if parameter.dtype != torch.float32:
        state["master"] = parameter.to(torch.float32, memory_format=torch.contiguous_format)
    return state


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into rows of a bounded size together, in the same way for every tensor of this shape."""
    if x.dim() == 0 or x.numel() == 0:
        return (x,)
    most = _AT_A_TIME["cpu" if x.device.type == "cpu" else "cuda"]
    return torch.split(x, max(1, most * len(x) // x.numel()))
