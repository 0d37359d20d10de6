"""Log-prob of a label, entropy and log-sum-exp of rows of the head, without its logits ever lying in memory.

Each program multiplies a tile of hidden states by a tile of the vocabulary and keeps of it, per row, m = max z,
s = Σ exp(z - m), a = Σ exp(z - m) (z - m); a second kernel merges the tiles of a row in the order of the vocabulary,
so that the result does not depend on which program was first. Statistics carried from tile to tile in registers would
spill. Memory: 3 numbers a row and tile, [V / 128, T] each, in place of V. Forward only.
Sources: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; Wijmans et al. 2024, arXiv:2411.09009.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastppo.kernels.scaling import accumulator, check_logits, check_rows, scale, scales
from torch import Tensor

# (tokens, vocabulary, hidden) of a tile, by bytes an element; launch options beside it. Half precision goes to tensor
# cores; fp32 keeps its 24 bits, so it does not, and needs small tiles; fp64 is for tests.
TILES: dict[int, tuple[dict[str, int], dict[str, Any]]] = {
    2: ({"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64}, {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}),
    4: ({"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32}, {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}),
    8: ({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 16}, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}),
}
# Programs that run at the same time share this many tiles of tokens and take the vocabulary in step, so that both stay
# in the cache.
GROUP = 8
MERGE_BLOCK = 128
MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def tile_logits(
    hidden_ptr,
    weight_ptr,
    tokens,
    words,
    num_tokens,
    vocabulary,
    hidden_size,
    stride_hidden,
    stride_weight,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """Return the products (BLOCK_T, BLOCK_V) of some hidden states and rows of the head."""
    # Rows beyond the end repeat the last one instead of being masked: nothing reads what comes of them.
    tokens = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    words = tl.minimum(words, vocabulary - 1).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + tokens[:, None] * stride_hidden + columns[None, :]
    weight_ptrs = weight_ptr + words[None, :] * stride_weight + columns[:, None]
    logits = tl.zeros((BLOCK_T, BLOCK_V), ACC)
    for start in range(0, hidden_size, BLOCK_H):
        if IS_EVEN:
            hidden, weight = tl.load(hidden_ptrs), tl.load(weight_ptrs)
        else:
            inside = start + columns < hidden_size
            hidden = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee", out_dtype=ACC)
        hidden_ptrs += BLOCK_H
        weight_ptrs += BLOCK_H
    return logits


@triton.jit
def _tile_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    m_ptr,
    s_ptr,
    a_ptr,
    label_z_ptr,
    inner: tl.float64,
    outer: tl.float64,
    num_tokens,
    vocabulary,
    hidden_size,
    stride_hidden,
    stride_weight,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    program, tiles_t, tiles_v = tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(vocabulary, BLOCK_V)
    first = program // (GROUP * tiles_v) * GROUP
    size = tl.minimum(tiles_t - first, GROUP)
    within = program % (GROUP * tiles_v)
    tile_t, tile_v = first + within % size, within // size
    tokens, words = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    u = tile_logits(
        hidden_ptr,
        weight_ptr,
        tokens,
        words,
        num_tokens,
        vocabulary,
        hidden_size,
        stride_hidden,
        stride_weight,
        ACC,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        IS_EVEN,
    )
    if HAS_BIAS:
        u += tl.load(bias_ptr + words, mask=words < vocabulary, other=0.0).to(ACC)[None, :]
    z = scale(u, tl.full((), inner, ACC), tl.full((), outer, ACC), HAS_SOFTCAP)
    # The tail is masked after scaling, where a cap can no longer turn -inf into a finite number.
    z = tl.where((words < vocabulary)[None, :], z, float("-inf"))
    is_token = tokens < num_tokens
    label = tl.load(labels_ptr + tokens, mask=is_token, other=-1)
    is_label = words[None, :] == label[:, None]
    # A label lies in one tile: only that one writes.
    label_z = tl.sum(tl.where(is_label, z, 0.0), axis=1)
    is_here = (label >= tile_v * BLOCK_V) & (label < tl.minimum((tile_v + 1) * BLOCK_V, vocabulary))
    tl.store(label_z_ptr + tokens, label_z, mask=is_token & is_here)
    # A finite floor: exp(-inf - -inf) of a tile of nothing but -inf would be NaN.
    m = tl.maximum(tl.max(z, axis=1), -1e30)
    shifted = z - m[:, None]
    p = tl.exp(shifted)
    at = tile_v.to(tl.int64) * num_tokens + tokens
    tl.store(m_ptr + at, m, mask=is_token)
    tl.store(s_ptr + at, tl.sum(p, axis=1), mask=is_token)
    tl.store(a_ptr + at, tl.sum(tl.where(p > 0, p * shifted, 0.0), axis=1), mask=is_token)


@triton.jit
def _merge_kernel(
    m_ptr,
    s_ptr,
    a_ptr,
    label_z_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    num_tokens,
    vocabulary,
    tiles,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    m = tl.full((BLOCK,), -1e30, ACC)
    s, a = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for tile in range(tiles):
        at = tl.cast(tile, tl.int64) * num_tokens + tokens
        tile_m = tl.load(m_ptr + at, mask=inside, other=-1e30)
        tile_s, tile_a = tl.load(s_ptr + at, mask=inside, other=0.0), tl.load(a_ptr + at, mask=inside, other=0.0)
        new_m = tl.maximum(m, tile_m)
        old_scale, tile_scale = tl.exp(m - new_m), tl.exp(tile_m - new_m)
        a = old_scale * (a + s * (m - new_m)) + tile_scale * (tile_a + tile_s * (tile_m - new_m))
        s = old_scale * s + tile_scale * tile_s
        m = new_m
    label = tl.load(labels_ptr + tokens, mask=inside, other=-1)
    is_valid = (label >= 0) & (label < vocabulary)
    label_z = tl.load(label_z_ptr + tokens, mask=inside & is_valid, other=0.0)
    is_empty, log_s = s == 0, tl.log(s)
    logprob = tl.where(is_empty, float("-inf"), label_z - m - log_s)
    tl.store(logprobs_ptr + tokens, tl.where(is_valid, logprob, float("nan")), mask=inside)
    tl.store(entropy_ptr + tokens, tl.where(is_empty, 0.0, log_s - a / s), mask=inside)
    tl.store(logsumexp_ptr + tokens, m + log_s, mask=inside)


def tile_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), (T,) fp32 each (fp64 for fp64), of labels (T,) under hidden (T, H).

    The head is weight (V, H) and bias (V,) or None; products are summed in fp32 and never rounded below it. The
    log-prob of a label outside [0, V) is NaN. Raises ValueError for tensors or numbers that cannot be served.
    """
    inner, outer = scales(temperature, softcap, logit_scale)
    _check_head(hidden, weight, bias)
    check_rows(hidden, torch.int64, labels=labels)
    (num_tokens, hidden_size), vocabulary, (dtype, acc) = hidden.shape, len(weight), accumulator(hidden)
    blocks, launch = TILES[hidden.element_size()]
    tiles_t, tiles_v = triton.cdiv(num_tokens, blocks["BLOCK_T"]), triton.cdiv(vocabulary, blocks["BLOCK_V"])
    partials = torch.empty(3, tiles_v, num_tokens, dtype=dtype, device=hidden.device)
    label_z, *results = (torch.empty(num_tokens, dtype=dtype, device=hidden.device) for _ in range(4))
    if num_tokens:
        _tile_statistics_kernel[(tiles_t * tiles_v,)](
            hidden,
            weight,
            bias,
            labels,
            *partials,
            label_z,
            inner,
            outer,
            num_tokens,
            vocabulary,
            hidden_size,
            hidden.stride(0),
            weight.stride(0),
            HAS_SOFTCAP=inner != 0,
            HAS_BIAS=bias is not None,
            IS_EVEN=hidden_size % blocks["BLOCK_H"] == 0,
            ACC=acc,
            GROUP=GROUP,
            **blocks,
            **launch,
        )
        grid = (triton.cdiv(num_tokens, MERGE_BLOCK),)
        merged = (*partials, label_z, labels, *results, num_tokens, vocabulary, tiles_v)
        _merge_kernel[grid](*merged, ACC=acc, BLOCK=MERGE_BLOCK, **MERGE_LAUNCH)
    return results[0], results[1], results[2]


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_logits(hidden, "hidden")
    check_logits(weight, "weight")
    kinds = [(tensor.dtype, tensor.device, tensor.shape[1]) for tensor in (hidden, weight)]
    if kinds[0] != kinds[1] or not len(weight):
        described = [f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" for tensor in (hidden, weight)]
        raise ValueError(f"hidden is {described[0]} and weight {described[1]}, expected (T, H) and (V, H) of one kind")
    expected = (weight.shape[:1], weight.device, True)
    if bias is not None and (bias.shape, bias.device, bias.is_contiguous()) != expected:
        described = [f"{tuple(bias.shape)} on {bias.device}", f"{tuple(weight.shape[:1])} on {weight.device}"]
        raise ValueError(f"bias is {described[0]}, expected {described[1]}, contiguous")
