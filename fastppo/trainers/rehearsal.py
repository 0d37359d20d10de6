"""A step of PPO rehearsed on tensors without numbers, so that its memory is known before it is taken.

The stages are those of a run: every tensor that they would make is made on the meta device and counted while it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.engine.kv import PagedCache
from fastppo.engine.steps import module_step
from fastppo.models import probe
from fastppo.models.attach import attached
from fastppo.models.in_place import place_of_gradient, weights_in_place
from fastppo.models.network import causal_lm, evaluating, language_head, last_hidden
from fastppo.models.passes import pass_tokens
from fastppo.ops.backends import rehearsing
from fastppo.ops.chunks import LogitBuffer
from fastppo.planner import Plan, Work
from fastppo.planner.live import LiveBytes
from fastppo.planner.network import Network
from fastppo.trainers.evaluate import evaluate
from fastppo.trainers.update import optimise
from fastppo.types import Evaluation, Experience, Samples, offsets_of

_META = torch.device("meta")
_SPARE_COLUMNS = 64  # of a left-padded cache


class Rehearsal:
    """Rehearses steps of different sizes on one network; what sizes have in common is rehearsed once."""

    def __init__(self, network: Network):
        self.network = network
        self._known: dict[tuple[str, Any], dict[str, int]] = {}

    def plan(self, work: Work) -> Plan:
        """Return what a step takes once the optimiser has its state. Raises NotImplementedError and ValueError."""
        config = work.config
        sizes = work.prompt, work.response, config.micro_batch_size, config.gradient_accumulation_steps
        passes = sizes, work.device, work.memory, config.kl_penalty, config.compat, config.optim
        stages = ("rollout", _rollout, work), ("evaluate", _evaluate, passes), ("update", _update, passes)
        phases = {}
        with rehearsing(work.device, work.memory), _explained(self.network):
            for name, run, key in stages:
                if (name, key) not in self._known:
                    self._known[name, key] = _measured(run, self.network, work)
                phases[name] = self._known[name, key] | {"records": work.record_bytes}
        return Plan(phases)


def _measured(run: Callable[..., None], network: Network, work: Work) -> dict[str, int]:
    """Return the bytes by label, at their peak, of one stage."""
    live = LiveBytes("meta", wide=len(language_head(network.model).weight))
    optimizer = _Adam(network.trained(), work.config.optim, partial(_make_gradients, network.model, live))
    for label, tensors in network.tensors().items():
        live.adopt(tensors, label)
    live.adopt(optimizer.state, "optimiser")
    with live:
        run(network, work, optimizer, live)
    return {label: size for label, size in live.at_peak.items() if size}


@contextmanager
def _explained(network: Network) -> Iterator[None]:
    """Say of what fails in a stranger's model that it cannot be rehearsed."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        name = type(causal_lm(network.model)).__name__
        raise NotImplementedError(
            f"{name} cannot be planned: it looks at the numbers that it computes with "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


class _Adam:
    """Adam as the memory sees it: moments, masters of what is not fp32, and one fp32 gradient at a time.

    In 8 bits moments of 4,096 numbers or more are a byte each, with a scale for every 256; pages are not the device's.
    """

    defaults: Mapping[str, Any] = {"fused": True}

    def __init__(self, parameters: list[nn.Parameter], name: str, begin: Callable[[], None]):
        self.param_groups, self.begin = [{"params": parameters}], begin
        self.state: list[Tensor] = []
        for parameter in parameters:
            if name.startswith("paged") and parameter.numel() >= 100_000:
                continue
            if name.endswith("8bit") and parameter.numel() >= 4096:
                self.state.append(torch.empty(2, parameter.numel(), dtype=torch.uint8, device=_META))
                self.state.append(torch.empty(2, -(-parameter.numel() // 256), device=_META))
                continue
            shape = (2, *parameter.shape)
            dtype = torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype
            self.state.append(torch.empty(shape, dtype=dtype, device=_META))
            if dtype != parameter.dtype:
                self.state.append(torch.empty(parameter.shape, dtype=dtype, device=_META))

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Let go of the gradients, and begin anew."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
        self.begin()

    def step(self) -> None:
        """Widen one gradient after another."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.float()


def _make_gradients(model: Any, live: LiveBytes) -> None:
    """Make the gradients that an update makes itself, which hooks would keep it from."""
    with live.labelled("gradients"):
        for weight in weights_in_place(model):
            place_of_gradient(weight)


def _samples(work: Work, passes: int) -> Samples:
    """Return the samples of so many forward passes of an optimiser step, or of all that it has."""
    length, config = work.prompt + work.response, work.config
    most = pass_tokens(_META)
    in_pass = config.micro_batch_size if most is None else max(1, most // length)
    count = min(config.micro_batch_size * config.gradient_accumulation_steps, passes * in_pass)
    ids = torch.zeros(count, length, dtype=torch.int64, device=_META)
    return Samples(
        queries=tuple(ids[:, : work.prompt]),
        responses=tuple(ids[:, work.prompt :]),
        rows=tuple(range(count)),
        num_given=count,
        positions=torch.arange(work.response).repeat(count),
        offsets=offsets_of([work.response] * count),
        labels=torch.zeros(count * work.response, dtype=torch.int64, device=_META),
        ended=torch.zeros(count, dtype=torch.bool),
        temperature=1.0,
    )


def _rollout(network: Network, work: Work, _: _Adam, live: LiveBytes) -> None:
    """Take the cache and the logits of all rows, and compute prompts."""
    model, config = network.model, work.config
    head, rows = language_head(model), min(config.batch_size, work.max_rows)
    buffer = LogitBuffer(head.weight, head.bias, rows)
    with torch.no_grad(), evaluating(model):
        if probe.paged(model):
            hidden = _prefill_paged(network, work, live)
        else:
            hidden = _prefill_padded(network, work, rows, live)
        buffer.fill(hidden[:rows].to(head.weight.dtype))


def _prefill_paged(network: Network, work: Work, live: LiveBytes) -> Tensor:
    model, batch = network.model, work.config.batch_size
    like = causal_lm(model).get_input_embeddings().weight
    length = work.prompt + work.response
    cache = PagedCache(probe.layer_shapes(model), like, work.kv_memory)
    if work.kv_memory is None:  # less than one sequence would not do, which the plan is to show
        cache.budget = max((work.memory - live.bytes) // 4, cache.least_bytes(length))
    with live.labelled("kv cache"):
        ledger = cache.take([length] * batch, work.max_rows, work.prefill_tokens)
    for _ in range(min(batch, work.max_rows)):
        ledger.open()
    tokens = min(work.prefill_tokens, work.prompt * batch)
    ids = torch.zeros(tokens, dtype=torch.int64, device=_META)
    places = torch.zeros(tokens, dtype=torch.int32, device=_META)
    with attached(model):
        return module_step(model, cache, ids, places, places)


def _prefill_padded(network: Network, work: Work, rows: int, live: LiveBytes) -> Tensor:
    """Run the model's own cache, whose rows then move to a buffer with room for their responses."""
    ids = torch.zeros(1, work.prompt, dtype=torch.int64, device=_META)
    before = live.bytes
    output = causal_lm(network.model)(input_ids=ids, use_cache=True)
    a_token = (live.bytes - before - output.logits.nbytes) / work.prompt
    size = int(a_token * rows * (work.prompt + work.response + _SPARE_COLUMNS))
    with live.labelled("kv cache"):
        torch.empty(size, dtype=torch.int8, device=_META)
    return last_hidden(network.model, input_ids=ids, use_cache=False)[0]


def _evaluate(network: Network, work: Work, _: _Adam, __: LiveBytes) -> None:
    """Run one pass of the reference, and of the policy where the whole distribution is compared."""
    samples = _samples(work, 1)
    records = torch.zeros(len(samples.labels), device=_META)
    rollout: Any = SimpleNamespace(values=records, logprobs=records, offsets=samples.offsets)
    options: dict[str, Any] = {
        "max_size": work.config.micro_batch_size,
        "exact_kl": work.config.kl_penalty == "full",
        "critic": work.config.critic,
    }
    reference: Any = network
    evaluate(network.model, reference, samples, rollout, **options)


def _update(network: Network, work: Work, optimizer: _Adam, live: LiveBytes) -> None:
    """Take one optimiser step: the second of its passes finds the gradients of the first, as all later ones do."""
    samples = _samples(work, 2)
    numbers = torch.zeros(len(samples.labels), device=_META)
    evaluation = Evaluation(numbers, numbers, numbers, None, is_recorded=True)
    scores = torch.zeros(len(samples), device=_META)
    experience = Experience(samples, evaluation, scores, numbers, numbers, numbers, numbers)
    # With a bonus every row has a gradient: which rows the clip leaves without one, only numbers would tell.
    config = replace(work.config, ppo_epochs=1, entropy_coef=1.0, early_stopping=False)
    in_place = weights_in_place(network.model)
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.relabel(p.grad, "gradients"))
        for parameter in network.trained()
        if not any(parameter is weight for weight in in_place)
    ]
    try:
        with live.keeping("activations"):
            optimise(network.model, optimizer, experience, config, 0)
    finally:
        for handle in handles:
            handle.remove()
