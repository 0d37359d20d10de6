"""Write a Llama in transformers' layout as a GGUF file for llama.cpp, without a vocabulary."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = {"fp32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of transformers' tensors."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows (out, in) of a query or key projection: llama.cpp rotates neighbours, transformers halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_header(writer: gguf.GGUFWriter, config: dict[str, Any], dtype: str) -> None:
    """Write what llama.cpp wants to know of a Llama."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "fp32" else gguf.LlamaFileType.MOSTLY_BF16)


def write_gguf(model_dir: Path, path: Path, dtype: str) -> None:
    """Convert the fp32 weights in `model_dir`; norms stay in fp32, as llama.cpp wants them."""
    config = json.loads((model_dir / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    add_header(writer, config, dtype)
    with safe_open(model_dir / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
            weight, target = tensors.get_tensor(name), gguf_name(name)
            part = target.split(".")[-2]
            if part in heads:
                weight = interleaved(weight, heads[part])
            kind = TYPES[dtype] if weight.ndim == 2 else TYPES["fp32"]
            data = np.ascontiguousarray(weight)
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
