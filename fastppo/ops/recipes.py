"""Results that are computed again in the backward pass, since that costs less than the memory that would keep them.

A norm's or a gate's result is a matmul's input, so autograd keeps it; but it follows, in one pass over memory, from
what the norm or the gate keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_NAME = "fastppo_recipe"


class Recipe:
    """How to compute a tensor again, for as many readers as keep it."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute, self._readers = compute, 0
        self._result: Tensor | None = None

    def keep(self) -> None:
        """Count one more reader."""
        self._readers += 1

    def take(self) -> Tensor:
        """Return the result, which is let go with its last reader."""
        result = self._compute() if self._result is None else self._result
        self._readers -= 1
        self._result = result if self._readers > 0 else None
        return result


def with_recipe(result: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return `result`, which no backward pass need keep: `compute` makes its contents again, without a graph."""
    if result.requires_grad:
        setattr(result, _NAME, Recipe(compute))
    return result


@contextmanager
def keeping_recipes() -> Iterator[None]:
    """Let autograd keep the recipe inside, of a result that has one and is read whole."""
    with saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: Tensor) -> Tensor | tuple[Recipe, tuple[int, ...]]:
    source = tensor if tensor._base is None else tensor._base
    recipe: Recipe | None = getattr(source, _NAME, None)
    is_whole = tensor.numel() == source.numel() and tensor.is_contiguous() and tensor.dtype == source.dtype
    if recipe is None or not is_whole or tensor._version:
        return tensor
    recipe.keep()
    return recipe, tuple(tensor.shape)


def _unpack(kept: Tensor | tuple[Recipe, tuple[int, ...]]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    return recipe.take().view(shape)
