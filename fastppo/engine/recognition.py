"""What kind of decoder a transformers model is: read off a trace of its modules, without knowing any model by name.

Each claim (which norm, which projection, how heads are turned) is checked against the numbers of the trace; what does
not fit raises UnsupportedModelError with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastppo.engine.linears import active, is_linear, read_linear
from fastppo.engine.matching import (
    best_rope,
    by_token,
    columns_of,
    gather,
    is_close,
    is_same,
    nonlinearity,
    norm_of_call,
    ratio,
)
from fastppo.engine.structure import Attention, FeedForward, Heads, Layer, Norm, Structure
from fastppo.engine.tracing import NUM_TOKENS, AttentionCall, Call, Trace, UnsupportedModelError


def recognise(record: Trace) -> Structure:
    """Return the structure of the decoder that left this trace, or raise UnsupportedModelError with the reason."""
    if not len(record.attentions) == len(record.left) == len(record.entered):
        raise UnsupportedModelError(
            f"{len(record.attentions)} calls of the attention function for {len(record.left)} layers: it has an "
            "attention of its own"
        )
    layers = tuple(_LayerReader(record, index).read() for index in range(len(record.left)))
    for before, after in zip(record.left, record.entered[1:], strict=False):
        _require(is_same(before, after), "something happens between two layers")
    outside = [call for call in record.calls if call.layer < 0]
    last = [call for call in outside if is_same(call.inputs, record.left[-1]) and is_same(call.passed, record.hidden)]
    _require(len(last) == 1, "the last layer is not followed by one norm")
    embedded = [call for call in outside if call is not last[0]]
    return Structure(*_embedding(record, embedded), layers, norm_of_call(last[0]), tuple(record.rotaries))


def _embedding(record: Trace, calls: list[Call]) -> tuple[Any, float, Any | None, int]:
    """Return the embedding, its scale, learned positions and the row of position 0."""
    modules = [active(call.module) for call in calls]
    for module in modules:
        _require(isinstance(module, nn.Embedding), f"{type(module).__name__} outside of the layers is not understood")
    _require(len(calls) in (1, 2), f"it has {len(calls)} embeddings")
    by_token = [call for call in calls if is_same(call.inputs, record.token_ids)]
    _require(len(by_token) == 1, "no embedding takes the token ids")
    token, learned = by_token[0], [call for call in calls if call is not by_token[0]]
    start, inner = record.entered[0], ratio(token.computed, active(token.module).weight[record.token_ids])
    if learned:
        start = start.float() - learned[0].passed.float()
    scale = inner * ratio(start, token.passed)
    _require(inner * scale != 0, "the layers start from something else than scaled token and position embeddings")
    if not learned:
        return token.module, scale, None, 0
    table = active(learned[0].module).weight
    offsets = [o for o in range(9) if is_same(learned[0].computed, table[o : o + NUM_TOKENS])]
    _require(bool(offsets), "the learned positions are not the rows of a table in order")
    return token.module, scale, learned[0].module, offsets[0]


class _LayerReader:
    """Takes the calls of one layer apart; every call must find its part."""

    def __init__(self, record: Trace, index: int) -> None:
        self.record, self.start, self.end = record, record.entered[index], record.left[index]
        self.calls = [call for call in record.calls if call.layer == index]
        attentions = [call for call in record.attentions if call.layer == index]
        _require(len(attentions) == 1, f"layer {index} calls the attention function {len(attentions)} times")
        self.attended = attentions[0]
        self.used: set[int] = set()
        for call in self.calls:
            if hasattr(call.module, "base_layer"):
                read_linear(call.module)  # raises for the adapters that are not known

    def read(self) -> Layer:
        attention, attention_inputs, attention_outputs = self.attention()
        feed_forward, inputs, outputs = self.feed_forward(attention_inputs)
        shares_norm = is_same(inputs, attention_inputs) and attention.norm is not None
        middle = self.start if shares_norm else self.before(feed_forward.norm, inputs)
        is_parallel = is_same(middle, self.start)
        start, both = self.start.float(), attention_outputs.float() + outputs.float()
        if is_parallel:
            scale = ratio(self.end - self.start, both.to(self.end.dtype))
        else:
            scale = ratio(middle - self.start, attention_outputs)
        _require(is_close(self.end, start + scale * both), "its residual connections are not understood")
        unused = [type(call.module).__name__ for call in self.calls if id(call) not in self.used]
        _require(not unused, f"what these modules do is not understood: {', '.join(sorted(set(unused)))}")
        bare = is_parallel and feed_forward.norm is None and not shares_norm
        _require(not bare, "its parallel feed-forward part has no norm")
        return Layer(attention, feed_forward, is_parallel, shares_norm, scale)

    def use(self, call: Call) -> Call:
        self.used.add(id(call))
        return call

    def maker(self, made: Tensor) -> Call | None:
        """Return the call that passed this on."""
        return next((self.use(call) for call in self.calls if is_same(call.passed, made)), None)

    def norm_of(self, made: Tensor) -> Norm | None:
        """Return the norm that made this; None if it is the hidden states as they are."""
        call = self.maker(made)
        return None if call is None else norm_of_call(call)

    def before(self, norm: Norm | None, made: Tensor) -> Tensor:
        """Return what a norm was given."""
        return made if norm is None else next(call.inputs for call in self.calls if is_same(call.passed, made))

    def after(self, made: Tensor) -> tuple[Norm | None, Tensor]:
        """Return the norm that takes this, if one does, and what goes on."""
        taken = [call for call in self.calls if is_same(call.inputs, made)]
        return (norm_of_call(self.use(taken[0])), taken[0].passed) if taken else (None, made)

    def attention(self) -> tuple[Attention, Tensor, Tensor]:
        call = self.attended
        queries, keys, values = (self.heads(part) for part in (call.queries, call.keys, call.values))
        inputs = [c.inputs for c in self.calls if c.module in (queries.linear, keys.linear, values.linear)]
        _require(
            all(is_same(part, inputs[0]) for part in inputs), "queries, keys and values see different hidden states"
        )
        projections = [c for c in self.calls if is_same(c.inputs, call.passed) and is_linear(c.module)]
        _require(len(projections) == 1, "attention is not followed by one projection")
        norm = self.norm_of(inputs[0])
        _require(is_same(self.before(norm, inputs[0]), self.start), "attention does not start from the layer's input")
        norm_after, outputs = self.after(self.use(projections[0]).passed)
        scale, softcap, window, sinks = _attention_options(call)
        scale *= queries.scale * keys.scale
        _require(values.scale == 1.0, "its values are scaled")
        kind = (self.record.layer_types or ["full_attention"] * (call.layer + 1))[call.layer]
        is_known = kind == "full_attention" or (kind == "sliding_attention" and window > 0)
        _require(is_known, f"{kind!r} of layer {call.layer} does not show in what its attention is given")
        part = Attention(norm, queries, keys, values, projections[0].module, norm_after, scale, softcap, window, sinks)
        return part, inputs[0], outputs

    def heads(self, states: Tensor) -> Heads:
        """Find the projection, norm and rotation that states (NUM_TOKENS, heads, size) went through."""
        count, size = states.shape[1:]
        for call, columns in self.sources(count, size):
            made = gather(call.passed, columns, size)
            normed = [
                c for c in self.calls if c.inputs.numel() == made.numel() and is_same(by_token(c.inputs, count), made)
            ]
            for norm in (None, *normed):
                before = made if norm is None else by_token(norm.passed, count)
                scale = ratio(states, before)
                rope = best_rope(self.record.rotaries, before, states) if scale == 0 else None
                if scale != 0 or rope is not None:
                    self.use(call)
                    found = None if norm is None else norm_of_call(self.use(norm))
                    return Heads(call.module, columns, size, found, rope, scale or 1.0)
        raise UnsupportedModelError("what is done to queries, keys or values before attention is not understood")

    def sources(self, count: int, size: int) -> Iterator[tuple[Call, tuple[int, ...]]]:
        """Yield projections and the columns in them that may be the heads."""
        call = self.attended
        heads, kv_heads = call.queries.shape[1], call.keys.shape[1]
        sizes = (heads * call.queries.shape[2], kv_heads * call.keys.shape[2], kv_heads * call.values.shape[2])
        for projection in filter(lambda c: is_linear(c.module), self.calls):
            outputs = projection.passed.shape[-1]
            if outputs == count * size:
                yield projection, tuple(range(0, outputs, size))
            if outputs != sum(sizes):
                continue
            for first in (0, sizes[0], sizes[0] + sizes[1]):
                yield projection, tuple(range(first, first + count * size, size))[:count]
            per_group = outputs // kv_heads
            for first in range(0, per_group, size):  # queries, key and value of each group side by side
                group = range(first, first + count // kv_heads * size, size)
                columns = tuple(g * per_group + column for g in range(kv_heads) for column in group)
                if columns[-1] + size <= outputs:
                    yield projection, columns

    def feed_forward(self, attention_inputs: Tensor) -> tuple[FeedForward, Tensor, Tensor]:
        rest = [call for call in self.calls if id(call) not in self.used]
        linears = [call for call in rest if is_linear(call.module)]
        functions = [call for call in rest if not list(active(call.module).parameters())]
        _require(len(functions) == 1, f"its feed-forward part has {len(functions)} activation modules, expected one")
        function, size = functions[0], functions[0].passed.shape[-1]
        parts = [(call, first) for call in linears for first in range(0, call.passed.shape[-1] - size + 1, size)]
        gates = [p for p in parts if is_same(function.inputs, columns_of(p[0].passed, p[1], size))]
        _require(len(gates) == 1, "no projection feeds the activation")
        products = [(part, function.passed * columns_of(part[0].passed, part[1], size)) for part in parts]
        for up, product in [(None, function.passed), *products]:
            for down in linears:
                if is_same(down.inputs, product):
                    return self.assemble(function, gates[0], up, down)
        raise UnsupportedModelError("its feed-forward part is not understood")

    def assemble(
        self, function: Call, gate: tuple[Call, int], up: tuple[Call, int] | None, down: Call
    ) -> tuple[FeedForward, Tensor, Tensor]:
        inputs, size = gate[0].inputs, function.passed.shape[-1]
        _require(up is None or is_same(up[0].inputs, inputs), "gate and up projection see different hidden states")
        for call in (function, gate[0], down, *(up or ())[:1]):
            self.use(call)
        norm = self.norm_of(inputs)
        norm_after, outputs = self.after(down.passed)
        part = FeedForward(
            norm,
            (gate[0].module, gate[1]),
            up and (up[0].module, up[1]),
            size,
            nonlinearity(function.module),
            down.module,
            norm_after,
        )
        return part, inputs, outputs


def _attention_options(call: AttentionCall) -> tuple[float, float, int, Tensor | None]:
    """Return scale, soft cap, window and sinks of a call of the attention function."""
    options = dict(call.options)
    scale = options.pop("scaling", None) or call.queries.shape[-1] ** -0.5
    softcap, window = options.pop("softcap", None) or 0.0, options.pop("sliding_window", None) or 0
    sinks, is_causal = options.pop("s_aux", None), options.pop("is_causal")
    _require(is_causal, "its attention is not causal")
    unknown = [name for name, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()]
    _require(not unknown, f"its attention takes {', '.join(unknown)}, which is not understood")
    return float(scale), float(softcap), int(window), sinks


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedModelError(reason)
