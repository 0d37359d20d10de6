"""Tiny random decoders of many kinds, and a reference run of their decode program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo.engine.program import BLOCK, Program
from fastppo.models.network import last_hidden

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "ffn_dim": 72,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama with scaled positions": (
        "llama",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": 5, "head_dim": 10}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma2": ("gemma2", GROUPED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3_text", GROUPED | SLIDING | {"head_dim": 16}),
    "phi": ("phi", SMALL | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", GROUPED | {"sliding_window": 6}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SMALL | {"hidden_act": "gelu"}),
    "gpt_neox in sequence": ("gpt_neox", SMALL | {"use_parallel_residual": False}),
    "opt": ("opt", SMALL | OPT),
    "olmo2": ("olmo2", GROUPED),
    "granite": (
        "granite",
        GROUPED | {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2},
    ),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 5}),
    "stablelm": ("stablelm", GROUPED | {"use_qkv_bias": True}),
    "stablelm in parallel": ("stablelm", GROUPED | {"use_parallel_residual": True}),
    "cohere": ("cohere", GROUPED | {"use_qk_norm": True}),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layers": [1, 0, 1]}),
    "glm4": ("glm4", GROUPED | {"head_dim": 16}),
    "nemotron": ("nemotron", GROUPED | {"hidden_act": "relu2"}),
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model whose norms and biases are not left at 1 and 0."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    return model.to(dtype)


class Staggered:
    """Sequences of different lengths that enter a program at different times, in blocks of random order."""

    def __init__(self, program: Program, num_sequences: int, max_tokens: int, dtype: torch.dtype, seed: int = 0):
        self.program = program
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-max_tokens // BLOCK)
        total = num_sequences * blocks + 3
        self.tables = [
            torch.randperm(total, generator=generator)[: num_sequences * blocks].reshape(num_sequences, blocks).int()
            for _ in program.windows
        ]
        self.pools = []
        for shape in program.layers:
            keys = torch.full((total, shape.kv_heads, shape.head_size, BLOCK), torch.nan, dtype=dtype)
            values = torch.full((total, shape.kv_heads, BLOCK, shape.value_size), torch.nan, dtype=dtype)
            self.pools.append((keys, values))

    def step(self, parts: list[tuple[int, int, Tensor]]) -> list[Tensor]:
        """Run (sequence, first position, ids) parts in one step; return the hidden states of each."""
        ids = torch.cat([part for _, _, part in parts])
        positions = torch.cat([torch.arange(first, first + len(part)) for _, first, part in parts])
        sequences = torch.cat([torch.full((len(part),), sequence) for sequence, _, part in parts])
        hidden = self.program.step(ids, positions, sequences, self.tables, self.pools)
        return list(hidden.split([len(part) for _, _, part in parts]))


def staggered_decode(program: Program, texts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the hidden states (length, H) of texts: text i enters at step i by half, then goes token by token."""
    run = Staggered(program, len(texts), max(map(len, texts)), dtype)
    done = [0] * len(texts)
    out: list[list[Tensor]] = [[] for _ in texts]
    for step in range(len(texts) + max(map(len, texts))):
        parts = []
        for i, text in enumerate(texts):
            if step < i or done[i] == len(text):
                continue
            count = max(1, len(text) // 2) if done[i] == 0 else 1
            parts.append((i, done[i], text[done[i] : done[i] + count]))
            done[i] += count
        for (i, _, _), hidden in zip(parts, run.step(parts) if parts else [], strict=True):
            out[i].append(hidden)
    return [torch.cat(part) for part in out]


def expected_hidden(model: Any, texts: list[Tensor]) -> list[Tensor]:
    """Return the hidden states by the model's own forward, each text by itself."""
    with torch.no_grad():
        return [last_hidden(model, input_ids=text[None], use_cache=False)[0].float() for text in texts]


def some_texts(vocabulary: int, lengths: tuple[int, ...] = (1, 7, 16, 21, 34)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]
