"""The list of operations of a decode program, made from a decoder's structure and its weights as they are now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastppo.engine.linears import Adapter, Matrix, active, read_linear
from fastppo.engine.structure import FeedForward, Heads, Layer, Norm, Rope, Structure
from fastppo.engine.tracing import UnsupportedModelError
from fastppo.ops.backends import native

# The activation buffers.
OUT, RESIDUAL, NORMED, PROJECTED, QUERIES, KEYS, VALUES, ATTENDED, BRANCH, GATES, ACTIVE, LOW_RANK = range(12)
NOWHERE = (-1, 0)

Place = tuple[int, int]  # a buffer and its first column


class Listing:
    """A native program and all tensors whose addresses it holds.

    Operations that work row by row share the rows among threads in the same way, so only a change between them and the
    others makes threads wait for each other.
    """

    def __init__(self, structure: Structure, ropes: list[Rope], groups: tuple[int, ...]) -> None:
        self.tensors: list[Tensor] = []
        self.ropes, self.structure = ropes, structure
        table = self.held(active(structure.embedding).weight)
        self.vocabulary, self.width = table.shape
        self.num_positions: int | None = None
        self.is_by_rows = True
        if table.dtype not in (torch.float32, torch.bfloat16) or table.stride(1) != 1 or table.device.type != "cpu":
            raise UnsupportedModelError(
                f"its embedding is {table.dtype} on {table.device}, not fp32 or bf16 on the CPU"
            )
        self.rounds = table.dtype is torch.bfloat16
        self.native = native().DecodeProgram(self.widths(), self.rounds)
        self.embed(table)
        for index, layer in enumerate(structure.layers):
            self.layer(layer, index, groups[index])
        self.norm(structure.norm, (RESIDUAL, 0), (OUT, 0), self.width)

    def widths(self) -> list[int]:
        """Return the columns of each buffer."""
        attentions = [layer.attention for layer in self.structure.layers]
        forward = [layer.feed_forward for layer in self.structure.layers]
        heads = [[len(part.columns) * part.size for part in (a.queries, a.keys, a.values)] for a in attentions]
        attended = max(len(a.queries.columns) * a.values.size for a in attentions)
        gates = max(2 * _whole_vectors(f.size) for f in forward)
        ranks = [
            sum(a.down.shape[0] for m in _linears(layer) for a in read_linear(m).adapters)
            for layer in self.structure.layers
        ]
        widest = [max(column) for column in zip(*heads, strict=True)]
        projected = max(map(sum, heads))
        own = [projected, *widest, attended, self.width, gates, max(f.size for f in forward), max(ranks)]
        return [self.width, self.width, self.width, *own]

    def held(self, tensor: Tensor) -> Tensor:
        """Keep a tensor alive for as long as its address is in use."""
        self.tensors.append(tensor)
        return tensor

    def parameter(self, tensor: Tensor | None, offset: float = 0.0) -> int:
        """Return the address of a small parameter in fp32, plus a number."""
        if tensor is None:
            return 0
        values = tensor.detach().float()
        return self.held((values + offset if offset else values).contiguous()).data_ptr()

    def embed(self, table: Tensor) -> None:
        """Append the sum of token and position embeddings."""
        learned = self.structure.positions and active(self.structure.positions).weight
        if learned is not None:
            self.num_positions = len(learned) - self.structure.position_offset
        place = (table.data_ptr(), table.stride(0), table.dtype is torch.bfloat16)
        positions = (self.parameter(learned), self.structure.position_offset)
        self.native.embed((RESIDUAL, 0), self.width, place, positions, self.structure.embedding_scale)

    def by_rows(self) -> bool:
        """Return whether the next operation, which works row by row, must wait for the threads."""
        waits, self.is_by_rows = not self.is_by_rows, True
        return waits

    def layer(self, layer: Layer, index: int, group: int) -> None:
        """Append one layer: residual + attention(...), then or beside it the feed-forward part."""
        attention, forward = layer.attention, layer.feed_forward
        self.attention(layer, self.normed(attention.norm), index, group)
        self.norm_after(attention.norm_after)
        if not layer.is_parallel:
            self.add_branch(layer)
        inputs = (NORMED, 0) if layer.shares_norm else self.normed(forward.norm)
        if layer.is_parallel:  # after the norm, which still reads the hidden states that entered the layer
            self.add_branch(layer)
        self.feed_forward(forward, inputs)
        self.norm_after(forward.norm_after)
        self.add_branch(layer)

    def attention(self, layer: Layer, inputs: Place, index: int, group: int) -> None:
        """Append projections, heads, writing to the cache, attention and the output projection."""
        part, column, placed, starts = layer.attention, 0, [], {}
        for heads in (part.queries, part.keys, part.values):
            if id(heads.linear) not in starts:
                starts[id(heads.linear)] = column
                placed.append((heads.linear, (PROJECTED, column)))
                column += read_linear(heads.linear).shape[0]
        self.project(inputs, placed)
        for heads, buffer in ((part.queries, QUERIES), (part.keys, KEYS), (part.values, VALUES)):
            self.heads(heads, (PROJECTED, starts[id(heads.linear)]), (buffer, 0))
        self.is_by_rows = False
        places = ((QUERIES, 0), (KEYS, 0), (VALUES, 0), (ATTENDED, 0))
        shape = (part.scale, part.softcap, part.window, self.parameter(part.sinks))
        self.native.attend(places, (index, group, len(part.queries.columns)), shape)
        self.project((ATTENDED, 0), [(part.output, (BRANCH, 0))])

    def heads(self, heads: Heads, projected: Place, to: Place) -> None:
        """Append the norm of heads and their way to their buffer, turned if they are."""
        columns, size = heads.columns, heads.size
        if heads.norm is not None:
            if columns != tuple(range(columns[0], columns[0] + len(columns) * size, size)):
                raise UnsupportedModelError("heads that are normalised do not stand side by side in their projection")
            place = (projected[0], projected[1] + columns[0])
            self.norm(heads.norm, place, place, len(columns) * size)
        rope = -1 if heads.rope is None else self.ropes.index(heads.rope)
        is_interleaved = heads.rope is not None and heads.rope.is_interleaved
        self.native.rotate(projected, to, size, columns, (rope, is_interleaved), self.by_rows())

    def feed_forward(self, part: FeedForward, inputs: Place) -> None:
        """Append the projections and the activation between them."""
        gate, up = (GATES, 0), NOWHERE
        linears = [(part.gate[0], gate)]
        if part.up is not None and part.up[0] is not part.gate[0]:
            up = (GATES, _whole_vectors(part.size))
            linears.append((part.up[0], up))
        elif part.up is not None:
            gate, up = (GATES, part.gate[1]), (GATES, part.up[1])
        self.project(inputs, linears)
        self.native.activate(gate, up, (ACTIVE, 0), part.size, part.function, self.by_rows())
        self.project((ACTIVE, 0), [(part.down, (BRANCH, 0))])

    def normed(self, norm: Norm | None) -> Place:
        """Append a norm of the hidden states, if there is one, and return where its result is."""
        if norm is None:
            return RESIDUAL, 0
        self.norm(norm, (RESIDUAL, 0), (NORMED, 0), self.width)
        return NORMED, 0

    def norm_after(self, norm: Norm | None) -> None:
        """Append a norm of what a branch adds, if there is one."""
        if norm is not None:
            self.norm(norm, (BRANCH, 0), (BRANCH, 0), self.width)

    def norm(self, norm: Norm, from_: Place, to: Place, columns: int) -> None:
        """Append a norm of `columns` columns, in groups of as many as its weight has."""
        module = active(norm.module)
        width = module.weight.shape[-1]
        stride = width if module.weight.numel() > width else 0
        parameters = (self.parameter(module.weight, norm.offset), self.parameter(getattr(module, "bias", None)))
        groups = (columns // width, stride)
        self.native.normalise(from_, to, width, groups, parameters, norm.epsilon, norm.is_centred, self.by_rows())

    def add_branch(self, layer: Layer) -> None:
        """Append the residual connection."""
        self.native.add((BRANCH, 0), (RESIDUAL, 0), self.width, layer.residual_scale, self.by_rows())

    def project(self, inputs: Place, linears: list[tuple[Any, Place]]) -> None:
        """Append linear layers of the same inputs: their products, then what their adapters add."""
        self.is_by_rows = False
        rank = 0
        products, additions = [], []
        for module, to in linears:
            matrix = read_linear(module)
            products.append((matrix, to))
            for adapter in map(self.rounded, matrix.adapters):
                products.append((adapter.down, (LOW_RANK, rank)))
                additions.append((adapter, (LOW_RANK, rank), to))
                rank += adapter.down.shape[0]
        for number, kind in enumerate(dict.fromkeys(matrix.type for matrix, _ in products)):
            self.native.pack(inputs, products[0][0].shape[1], kind, kind, number == 0)
        for number, (matrix, to) in enumerate(products):
            self.multiply(matrix, inputs, to, (1.0, False), matrix.type, number == 0)
        for number, (adapter, from_, to) in enumerate(additions):
            self.multiply(adapter.up, from_, to, (adapter.scale, True), -1, number == 0)

    def rounded(self, adapter: Adapter) -> Adapter:
        """Return an adapter as models/lora.py multiplies with it: in the dtype of the activations."""
        if not self.rounds:
            return adapter
        down, up = (replace(part, weight=part.weight.bfloat16()) for part in (adapter.down, adapter.up))
        return replace(adapter, down=down, up=up)

    def multiply(
        self, matrix: Matrix, from_: Place, to: Place, addition: tuple[float, bool], pack: int, waits: bool
    ) -> None:
        """Append one product; `addition` is its factor and whether it is added to what is there."""
        weight = self.held(matrix.weight)
        place = (weight.data_ptr(), weight.stride(0), matrix.type, matrix.is_transposed)
        scales, bias = self.parameter(matrix.row_scales), self.parameter(matrix.bias)
        described = None
        if matrix.four_bits is not None:
            self.tensors += matrix.four_bits.tensors
            described = matrix.four_bits.described
        self.native.multiply(from_, to, matrix.shape, (*place, scales), bias, addition, pack, waits, described)


def _linears(layer: Layer) -> list[Any]:
    """Return the linear layers of a layer, those that several parts share once."""
    attention, forward = layer.attention, layer.feed_forward
    parts = [part.linear for part in (attention.queries, attention.keys, attention.values)]
    parts += [attention.output, forward.gate[0], forward.down, *(() if forward.up is None else (forward.up[0],))]
    return list({id(part): part for part in parts}.values())


def _whole_vectors(size: int) -> int:
    """Return the size rounded up to the longest vectors, so that no two parts of a buffer share one."""
    return -(-size // 16) * 16
