"""The numeric probe: which ways to run a model give its own log-probs.

Models that do not go through transformers' AttentionInterface, whose masks mean more than causality and a window, or
that carry a state from token to token would be silently wrong in one layout or another. So nothing here knows a model
by name: a few random sequences are run in a layout and compared with the model's own forward of each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastppo.attention import LayerCache, LayerShape, Paged, attending
from fastppo.models.attach import attached, packed_hidden, pinned_rope
from fastppo.models.network import (
    causal_lm,
    evaluating,
    is_encoder_decoder,
    language_head,
    last_hidden,
    short_windows,
)
from fastppo.models.probe_runs import alone, embeddings, own_hidden, random_sequences, sources_of
from fastppo.models.seq2seq import decoded
from fastppo.reference_attention import BLOCK

_WINDOW = 8  # shorter than the sequences
_SMALL = 4096  # numbers in a parameter whose gradient is compared
# How far log-probs may differ: so many times what one rounding of the embeddings or another batch does to them, at
# least and at most so much. Sums in another order have moved them about as far as that rounding does, or less; lost
# windows, caps, sinks and neighbours by 0.2 and more.
_BOUNDS = {
    torch.float64: (10.0, 1e-5, 1e-3),
    torch.float32: (10.0, 2e-4, 1e-2),
    torch.bfloat16: (2.0, 0.1, 0.4),
    torch.float16: (2.0, 0.02, 0.2),
}


@dataclass(frozen=True)
class Verdict:
    """What the probe said of one way to run a model; true if it may be used."""

    error: float = float("nan")  # max |Δ log-prob| to the model's own forward
    bound: float = float("nan")  # what it may be
    reason: str = ""  # why it is refused; empty where it is not

    def __bool__(self) -> bool:
        return not self.reason


# fastppo's attention is causal and over one sequence, which an encoder's and cross-attention are not.
_TWO_NETWORKS = Verdict(reason="it has an encoder and a decoder")
_verdicts: WeakKeyDictionary[nn.Module, dict[Any, Verdict]] = WeakKeyDictionary()

Run = Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]]


def verdict(model: nn.Module, name: str, run: Run) -> Verdict:
    """Compare `run(model, sequences)`, the last hidden states of each, with the model's own forward of each by itself.

    The answer is remembered under `name` until the model's dtype, device or adapters change. The model is left as it
    was, its random numbers too. An error that the layout raises is the reason why it is refused.
    """
    return _remembered(model, name, lambda: _compare(model, run))


def is_same(model: nn.Module, name: str, run: Run, other: Run) -> bool:
    """Whether two ways to run a model give the same last hidden states to the last bit; remembered as verdicts are."""

    def compare() -> Verdict:
        pairs = zip(*(way(model, random_sequences(model)) for way in (run, other)), strict=True)
        return Verdict(reason="" if all(a.equal(b) for a, b in pairs) else "its last digits are others")

    return bool(_remembered(model, name, compare))


def assume(model: nn.Module, verdicts: Mapping[str, Verdict]) -> None:
    """Take verdicts for granted, by their names: of a model on the meta device, which has no numbers to compare."""
    known = {(name, *_state(model)): verdict for name, verdict in verdicts.items()}
    _verdicts.setdefault(causal_lm(model), {}).update(known)


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Return what a verdict depends on besides its name."""
    inner = causal_lm(model)
    adapters = sorted((type(m).__name__, str(m.merged_adapters)) for m in model.modules() if hasattr(m, "lora_A"))
    meanings = sorted({str(m.meaning) for m in model.modules() if hasattr(m, "codes_and_scales")})
    return inner.dtype, inner.device, tuple(adapters), tuple(meanings)


def _remembered(model: nn.Module, name: str, compare: Callable[[], Verdict]) -> Verdict:
    inner, key = causal_lm(model), (name, *_state(model))
    known = _verdicts.setdefault(inner, {})
    if key not in known:
        devices = [inner.device] if inner.device.type == "cuda" else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            evaluating(model),
            pinned_rope(model),
            short_windows(inner, _WINDOW),
        ):
            known[key] = compare()
    return known[key]


def _compare(model: nn.Module, run: Run) -> Verdict:
    sequences = random_sequences(model)
    own = alone(model, sequences)
    noise = _noise(model, sequences, own)
    if noise != noise:
        raise FloatingPointError(
            f"the logits of {type(causal_lm(model)).__name__} are not finite; check the weights, and load the model in "
            "float32 or bfloat16, not float16"
        )
    factor, least, most = _BOUNDS[causal_lm(model).dtype]
    bound = min(max(factor * noise, least), most)
    try:
        hidden = run(model, sequences)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a stranger's model does in a layout that it was not made for
        return Verdict(bound=bound, reason=f"{type(error).__name__}: {error}".splitlines()[0])
    worst = _difference(model, hidden, own)
    if not worst <= bound:
        return Verdict(worst, bound, f"log-probs differ from the model's own by {worst:.3g}, more than {bound:.2g}")
    return Verdict(worst, bound)


def _noise(model: nn.Module, sequences: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """Return how far the model's own log-probs move in a larger batch, or with embeddings off by one rounding."""
    repeated = own_hidden(model, sequences[-1].repeat(3, 1), sources_of(sequences)[-1].repeat(3, 1))[0]
    generator = torch.Generator().manual_seed(3)

    def perturb(_: Any, __: Any, output: Tensor) -> Tensor:
        signs = torch.randn(output.shape, generator=generator).sign().to(output)
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handles = [table.register_forward_hook(perturb) for table in embeddings(model)]
    try:
        perturbed = alone(model, sequences)
    finally:
        for handle in handles:
            handle.remove()
    return _difference(model, [repeated, *perturbed], [own[-1], *own])


def _difference(model: nn.Module, hidden: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """Return max |Δ log-prob|, NaN if there is a NaN; one sequence at a time, for vocabularies are large."""
    pairs = [(part, whole[-len(part) :]) for part, whole in zip(hidden, own, strict=True)]
    return float(torch.stack([(_logprobs(model, a) - _logprobs(model, b)).abs().max() for a, b in pairs]).max())


def _compare_gradients(model: nn.Module) -> Verdict:
    sequences = random_sequences(model)
    own = _gradients(model, lambda: torch.cat(alone(model, sequences)))
    try:
        with attached(model):
            ours = _gradients(model, lambda: packed_hidden(model, sequences))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict(reason=f"{type(error).__name__}: {error}".splitlines()[0])
    size = torch.stack([grad.abs().max() for grad in own]).max()
    worst = float(torch.stack([(a - b).abs().max() for a, b in zip(ours, own, strict=True)]).max() / size)
    bound = 5.0 * _BOUNDS[causal_lm(model).dtype][1]
    reason = f"gradients differ from the model's own by {worst:.3g} of the largest, more than {bound:.2g}"
    return Verdict(worst, bound, "" if worst <= bound else reason)


def _gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Return the gradients of a random projection of the hidden states: of the embeddings, through which those of all
    layers flow, and of the small parameters that are trained, which attention may be given, as sinks are.
    """
    captured: list[Tensor] = []

    def capture(_: Any, __: Any, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(capture)
    try:
        with torch.enable_grad():
            hidden = forward()
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
            projection = (hidden * weights).sum()
    finally:
        handle.remove()
    trained = [p for p in model.parameters() if p.requires_grad and p.numel() <= _SMALL]
    grads = torch.autograd.grad(projection, [*captured, *trained], materialize_grads=True)
    embeddings = torch.cat([grad.flatten(0, -2) for grad in grads[: len(captured)]])
    return [embeddings, *grads[len(captured) :]]


def _logprobs(model: nn.Module, hidden: Tensor) -> Tensor:
    if causal_lm(model).get_output_embeddings() is None:
        return hidden.float()
    head = language_head(model)
    return head.logits(hidden.to(head.weight.dtype), 1.0).log_softmax(-1)


def paged(model: nn.Module) -> Verdict:
    """Say whether the model can decode on the paged cache: chunked prefill, staggered joins, blocks in any order."""
    if is_encoder_decoder(model):
        return _TWO_NETWORKS
    return verdict(model, "paged", _paged)


def packed(model: nn.Module) -> Verdict:
    """Say whether whole sequences can lie side by side in one row."""
    if is_encoder_decoder(model):
        return _TWO_NETWORKS
    return verdict(model, "packed", _packed)


def trains_packed(model: nn.Module) -> Verdict:
    """Say whether packed sequences also have the gradients that each has by itself."""
    return packed(model) and _remembered(model, "packed gradients", lambda: _compare_gradients(model))


def padded(model: nn.Module) -> Verdict:
    """Say whether padding on the right leaves the tokens before it alone."""
    return verdict(model, "padded", _padded)


def _packed(model: nn.Module, sequences: Sequence[Tensor]) -> Sequence[Tensor]:
    with attached(model):
        return [*packed_hidden(model, sequences).split([len(ids) for ids in sequences])]


def _padded(model: nn.Module, sequences: Sequence[Tensor]) -> list[Tensor]:
    if is_encoder_decoder(model):
        hidden = decoded(model, sources_of(sequences), sequences)
    else:
        ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        hidden = last_hidden(model, input_ids=ids, use_cache=False)
    return [row[: len(sequence)] for row, sequence in zip(hidden, sequences, strict=True)]


def layer_shapes(model: nn.Module) -> dict[int, LayerShape]:
    """Return what each attention layer of a model on fastppo's attention stores for a token, by its layer_idx."""
    seen: dict[int, LayerShape] = {}
    with torch.no_grad(), evaluating(model), attached(model):
        packed_hidden(model, [torch.zeros(2, dtype=torch.int64)], seen)
    return seen


def _paged(model: nn.Module, sequences: Sequence[Tensor]) -> list[Tensor]:
    layers = layer_shapes(model)
    if not layers:
        raise NotImplementedError("its attention does not go through transformers' AttentionInterface")
    blocks = [-(-len(ids) // BLOCK) for ids in sequences]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).to(sequences[0].device, torch.int32)
    tables = nn.utils.rnn.pad_sequence(list(order.split(blocks)), batch_first=True)
    like = causal_lm(model).get_input_embeddings().weight
    pools = {index: shape.pool(sum(blocks), like) for index, shape in layers.items()}
    for pool in pools.values():
        for part in pool:
            part.fill_(3.0)  # what nobody wrote must not be read
    caches = {index: LayerCache(pool, tables) for index, pool in pools.items()}
    return _scheduled(model, sequences, caches)


def _scheduled(model: nn.Module, sequences: Sequence[Tensor], caches: Mapping[int, LayerCache]) -> list[Tensor]:
    """Run chunks of several sequences together; return the hidden states of each sequence in order."""
    hidden: list[list[Tensor]] = [[] for _ in sequences]
    device = sequences[0].device
    for step in schedule([len(ids) for ids in sequences]):
        lengths = [end - begin for _, begin, end in step]
        rows = torch.repeat_interleave(torch.tensor([row for row, _, _ in step]), torch.tensor(lengths))
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in step]).to(device)
        ids = torch.cat([sequences[row][begin:end] for row, begin, end in step])
        with attached(model), attending(Paged(rows.to(device, torch.int32), positions.int(), caches)):
            out = last_hidden(model, input_ids=ids[None], position_ids=positions[None], use_cache=False)[0]
        for (row, _, _), part in zip(step, out.split(lengths), strict=True):
            hidden[row].append(part)
    return [torch.cat(parts) for parts in hidden]


def schedule(lengths: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Return steps of (sequence, begin, end): each sequence joins one step later than the one before it, has its
    prompt in two chunks, then decodes two tokens one by one; every other step takes them in the opposite order.
    """
    cuts = [sorted({0, n // 3, max(n - 2, 0), n - 1, n}) for n in lengths]
    steps = []
    for time in range(max(len(cut) for cut in cuts) + len(lengths)):
        step = [
            (row, cut[time - row], cut[time - row + 1])
            for row, cut in enumerate(cuts)
            if 0 <= time - row < len(cut) - 1
        ]
        if step:
            steps.append(step[:: 1 - 2 * (time % 2)])
    return steps
