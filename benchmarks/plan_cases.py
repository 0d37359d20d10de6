"""The runs that the planner is measured on: small random models of many kinds, and how they are trained."""

from dataclasses import dataclass, field
from typing import Any

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8000,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 8000, "n_positions": 2048}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 6, "vocab_size": 6000,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "vocab_size": 8000, "word_embed_proj_dim": 256,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
TIED, CONTEXT = {"tie_word_embeddings": True}, {"max_position_embeddings": 4096}


@dataclass(frozen=True)
class Case:
    """One run: a model, how its weights lie in memory, and a step."""

    name: str
    model: dict[str, Any]
    batch: int
    prompt: int
    response: int
    lora_r: int | None = None
    targets: str | None = None
    bits: int | None = None
    ppo: dict[str, Any] = field(default_factory=dict)  # fields of PPOConfig


def _llama(**changes: Any) -> dict[str, Any]:
    return LLAMA | CONTEXT | changes


CASES = [
    Case("llama, full", _llama(), 8, 64, 64),
    Case("llama, full, bf16", _llama(), 8, 64, 64, ppo={"bf16": True}),
    Case("llama, full, checkpointing", _llama(), 8, 64, 64, ppo={"gradient_checkpointing": True}),
    Case("llama, full, tied head", _llama(**TIED), 8, 64, 64),
    Case("llama, full, grouped queries", _llama(**GROUPED), 8, 64, 64),
    Case("llama, full, one sample a pass", _llama(), 4, 128, 128, ppo={"mini_batch_size": 1}),
    Case("llama, full, accumulated", _llama(), 8, 32, 96, ppo={"mini_batch_size": 2, "gradient_accumulation_steps": 2}),
    Case("llama, full, long", _llama(num_hidden_layers=2), 2, 1000, 600),
    Case("llama, LoRA", _llama(), 8, 64, 64, lora_r=16),
    Case("llama, LoRA all linear, bf16", _llama(), 8, 64, 64, 16, "all-linear", ppo={"bf16": True}),
    Case("llama, LoRA all linear, checkpointing", _llama(), 16, 64, 128, 8, "all-linear",
         ppo={"gradient_checkpointing": True}),
    Case("llama, LoRA, large vocabulary, tied", _llama(vocab_size=64000, **TIED), 8, 64, 64, lora_r=8),
    Case("llama, LoRA, many short samples", _llama(), 64, 16, 16, lora_r=16),
    Case("gpt2, full", GPT2, 8, 64, 64),
    Case("gpt2, LoRA", GPT2, 8, 200, 56, lora_r=16),
    Case("gpt2, full, bf16, checkpointing", GPT2, 4, 100, 156, ppo={"bf16": True, "gradient_checkpointing": True}),
    Case("qwen2, full, grouped, tied", _llama(model_type="qwen2", **GROUPED, **TIED), 8, 64, 64),
    Case("gemma2, LoRA, windows and caps", _llama(model_type="gemma2", head_dim=32, sliding_window=64), 8, 64, 128, 16),
    Case("gpt_neox, full", NEOX, 8, 64, 64),
    Case("opt, full", OPT, 8, 64, 64),
    Case("llama, LoRA, 8 bits", _llama(), 8, 64, 64, 16, "all-linear", bits=8),
    Case("llama, LoRA, 4 bits", _llama(), 8, 64, 64, 16, "all-linear", bits=4),
    Case("llama, LoRA, critic on an adapter", _llama(), 8, 64, 64, 16, "all-linear", ppo={"critic": "adapter"}),
    Case("llama, full, critic of its own", _llama(), 8, 64, 64, ppo={"critic": "full"}),
    Case("llama, full, deep", _llama(num_hidden_layers=12, hidden_size=128, intermediate_size=352), 8, 32, 32),
]  # fmt: skip
