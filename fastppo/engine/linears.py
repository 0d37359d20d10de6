"""The tensors behind linear layers of every kind that a transformers model has: plain, Conv1D, 8-bit, with LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastppo.engine.tracing import UnsupportedModelError
from fastppo.ops.four_bits import TYPES, FourBits
from fastppo.ops.matmul import WEIGHT_TYPES


@dataclass(frozen=True, eq=False)
class Adapter:
    """y += scale·B(A x)."""

    down: Matrix  # A
    up: Matrix  # B
    scale: float


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as it lies in memory, and how to read it."""

    weight: Tensor  # (outputs, inputs), or (inputs, outputs) if transposed; in 4 bits bytes
    is_transposed: bool = False
    row_scales: Tensor | None = None  # (outputs,) fp32, int8 only
    bias: Tensor | None = None  # (outputs,) fp32
    adapters: tuple[Adapter, ...] = ()
    four_bits: FourBits | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        if self.four_bits is not None:
            return self.four_bits.shape
        rows, columns = self.weight.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def type(self) -> int:
        """The number of the weight's dtype in csrc/small_matmul.hpp."""
        if self.four_bits is not None:
            return TYPES[self.four_bits.dtype]
        return WEIGHT_TYPES[self.weight.dtype]


def active(module: Any) -> Any:
    """Return the module that acts, where PEFT keeps a trained copy beside the original."""
    if not hasattr(module, "modules_to_save"):
        return module
    names = module.active_adapters
    return module.original_module if module.disable_adapters or not names else module.modules_to_save[names[0]]


def is_linear(module: Any) -> bool:
    """Tell whether a module is a linear layer of a known kind."""
    try:
        read_linear(module)
    except UnsupportedModelError:
        return False
    return True


def read_linear(module: Any) -> Matrix:
    """Return the tensors of a linear layer as it acts now. Raises UnsupportedModelError for what is no such layer."""
    module = active(module)
    base = active(module.get_base_layer()) if hasattr(module, "base_layer") else module
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().float()
    if hasattr(base, "codes_and_scales"):
        if base.meaning != "weight_only":
            raise UnsupportedModelError(f"8-bit layers that mean {base.meaning!r} are not known here")
        codes, scales = base.codes_and_scales()
        return Matrix(_readable(codes), False, scales.contiguous(), bias, _adapters(module))
    if hasattr(base, "four_bits"):
        bits = base.four_bits()
        if bits.type_for(bits.dtype) is None or bits.codes.device.type != "cpu":
            raise UnsupportedModelError(
                f"a weight in 4 bits stands for {bits.dtype} {bits.shape} on {bits.codes.device}, expected fp32 or "
                "bf16 with an even number of inputs on the CPU"
            )
        return Matrix(bits.codes, bias=bias, adapters=_adapters(module), four_bits=bits)
    is_transposed = type(base).__name__ == "Conv1D" and hasattr(base, "nf")
    is_plain = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    if not is_transposed and not is_plain:
        raise UnsupportedModelError(f"{type(base).__name__} is no linear layer that is known here")
    return Matrix(_readable(base.weight), is_transposed, None, bias, _adapters(module))


def _readable(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or weight.dtype not in WEIGHT_TYPES or weight.dim() != 2 or weight.stride(1) != 1:
        raise UnsupportedModelError(
            f"a weight is {weight.dtype} {tuple(weight.shape)} with strides {weight.stride()} on {weight.device}, "
            "expected fp32, bf16 or int8 rows on the CPU"
        )
    return weight.detach()


def _adapters(module: Any) -> tuple[Adapter, ...]:
    """Return the active LoRA adapters of a layer that PEFT may have wrapped."""
    if not hasattr(module, "base_layer"):
        return ()
    if not hasattr(module, "lora_A"):
        raise UnsupportedModelError(f"adapters of the kind {type(module).__name__} are not known here, only LoRA is")
    if module.merged:
        raise UnsupportedModelError("an adapter is merged into its weights: unmerge it")
    if module.disable_adapters:
        return ()
    return tuple(_adapter(module, name) for name in module.active_adapters if name in module.lora_A)


def _adapter(module: Any, name: str) -> Adapter:
    down, up = module.lora_A[name], module.lora_B[name]
    if name in module.lora_variant or name in module.lora_magnitude_vector or up.bias is not None:
        raise UnsupportedModelError(f"the adapter {name!r} is more than B·A (DoRA, a bias, or another variant)")
    return Adapter(Matrix(_readable(down.weight)), Matrix(_readable(up.weight)), float(module.scaling[name]))
