"""Results that are computed again in the backward pass, since that costs less than the memory that would keep them.

A norm's or a gate's result is a matmul's input, so autograd keeps it; but it follows, in one pass over memory, from
what the norm or the gate keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

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


class _Kept(NamedTuple):
    """A tensor as autograd would keep it: with the version that it had, for torch looks at none where there are hooks.

    Without its graph: a result that its own graph keeps, as tanh's is, would keep that graph, and all that it keeps,
    for good where no backward pass comes, as after an interrupt. Autograd puts the graph back.
    """

    tensor: Tensor
    version: int


def _pack(tensor: Tensor) -> _Kept | tuple[Recipe, tuple[int, ...]]:
    source = tensor if tensor._base is None else tensor._base
    recipe: Recipe | None = getattr(source, _NAME, None)
    is_whole = tensor.numel() == source.numel() and tensor.is_contiguous() and tensor.dtype == source.dtype
    if recipe is None or not is_whole or tensor._version:
        return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)
    recipe.keep()
    return recipe, tuple(tensor.shape)


def _unpack(kept: _Kept | tuple[Recipe, tuple[int, ...]]) -> Tensor:
    if isinstance(kept, _Kept):
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor {tuple(kept.tensor.shape)} that the backward pass needs was modified by an inplace "
                f"operation: it is at version {kept.tensor._version}, expected version {kept.version}; modify a copy"
            )
        return kept.tensor
    recipe, shape = kept
    return recipe.take().view(shape)
