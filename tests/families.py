"""The table of docs/models.md: how families of transformers models generate and train, probed on tiny random ones.

python -m tests.families > docs/models.md
"""

import inspect
import logging
import math
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

# What a configuration has of these is set; the rest follows from the family.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # large enough for attention to choose
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "state_size": 4,
    "encoder_layers": 1,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
_LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
_LINEAR = {"num_hidden_layers": 4, "linear_num_value_heads": 2, "linear_num_key_heads": 2}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Family of transformers -> what it needs besides to be small and to have everything that sets it apart.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "ministral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "opt": {},
    "biogpt": {},
    "stablelm": {},
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "granite": {},
    "granitemoe": {},
    "cohere": {},
    "cohere2": {},
    "smollm3": {},
    "glm": {},
    "glm4": {},
    "exaone4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "bitnet": {},
    "helium": {},
    "nemotron": {},
    "persimmon": {},
    "minimax": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 1},
    "bloom": {},
    "falcon": {"alibi": True},
    "mpt": {},
    "gptj": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "codegen": {},
    "xglm": {"attention_heads": 4},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_hidden_layers": 4},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {},
    "falcon_h1": _STATES | {"mamba_n_heads": 4, "mamba_d_ssm": 32},
    "granitemoehybrid": _STATES | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"embedding_dim": 32, "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "openai-gpt": {},
    "bart": {},
    "mbart": {},
    "pegasus": {},
    "marian": {"decoder_vocab_size": 64},
}
FAST = ("llama", "gemma2", "gpt_oss", "gpt2", "bloom", "gpt_neo", "llama4_text", "mamba", "lfm2", "rwkv", "bart")
# The same for models that read with an encoder, and what all of these are given besides.
_ENCODER = {"d_kv": 8, "d_ff": 48, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "encoder_layers": 2}
_ENCODER |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4}
_ENCODER |= {"num_decoder_attention_heads": 4, "decoder_start_token_id": 2}
SEQ2SEQ = {
    "t5": {},
    "mt5": {},
    "umt5": {},
    "longt5": {},
    "switch_transformers": {},
    "bart": {},
    "mbart": {"forced_bos_token_id": 5},
    "pegasus": {},
    "pegasus_x": {},
    "marian": {"decoder_vocab_size": 64},
    "m2m_100": {},
    "nllb-moe": {},
    "blenderbot": {},
    "blenderbot-small": {},
    "plbart": {},
    "mvp": {},
    "led": {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 8},
    "bigbird_pegasus": {},
    "prophetnet": {},
}
FAST_SEQ2SEQ = ("t5", "m2m_100")


def build(family, with_encoder=False):
    """Return a tiny random model of a family, as transformers loads it by default."""
    with _quiet():
        kind = type(AutoConfig.for_model(family))
    known = {name for parent in kind.__mro__ for name in getattr(parent, "__annotations__", {})}
    known |= set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    sizes, special = (SIZES | _ENCODER, SEQ2SEQ) if with_encoder else (SIZES, FAMILIES)
    settings = {name: value for name, value in sizes.items() if name in known} | special[family]
    if with_encoder:
        settings |= {"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    with _quiet():
        return (AutoModelForSeq2SeqLM if with_encoder else AutoModelForCausalLM).from_config(kind(**settings)).eval()


@contextmanager
def _quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def row(family, with_encoder=False):
    """Return the table's entries for a family: tier, layout of training, and max |Δ log-prob| of that tier."""
    from fastppo.engine.tiers import capabilities
    from fastppo.models import probe

    model = build(family, with_encoder)
    with _quiet():
        found, packed, padded = capabilities(model), probe.trains_packed(model), probe.padded(model)
    training = "packed" if packed else "padded" if padded else "no"
    # The power of ten above it: the figure itself depends on the machine.
    above = math.ceil(math.log10(found.verdict.error)) if found.verdict.error else None
    return found.tier, training, "0" if above is None else f"< 1e{above}"


HEAD = """# Models

Which way of generating and training is right for a model is found out when it is loaded: random sequences are run and
their log-probs compared with the model's own forward, never by the model's name. `fastppo inspect` does this for yours.
Here are tiny random models of {count} families, each with the features that set it apart (windows, soft caps, sinks,
ALiBi, latent attention, recurrent states), under transformers {version}.

- Generation: A, paged cache on fastppo's attention; B, a left-padded cache on the model's own attention; C, the same
  with a slot for recurrent states, for models that no padding suits; D, whole sequences anew at every token.
- Training and scoring: packed, samples side by side in one row where the attention has kernels; padded, samples of
  similar length padded on the right.
- bart, mbart, pegasus and marian are here the decoders by themselves, which transformers has as causal models.

| family | generation | training | max difference of log-probs, fp32 |
|---|---|---|---|"""
SEQ2SEQ_HEAD = """
## Encoder-decoders

{count} families with encoder and decoder (`AutoModelForSeq2SeqLMWithValueHead`). A query is what the encoder reads, and
a response what the decoder writes after its start token (and, for mBART and its like, the language that is forced upon
it), neither of which is part of the response. The encoder runs once over each distinct prompt of a generate call, and
so do the projections that cross-attention reads.

- Generation: B, a left-padded cache of the decoder, whose rows are refilled as responses end; C, for decoders whose
  positions cannot be chosen: the responses of a batch start together, and the next batch when all have ended.
- Training and scoring: encoder and decoder are padded on the right, each for itself, in groups that are alike in both.

| family | generation | training | max difference of log-probs, fp32 |
|---|---|---|---|"""


def main():
    """Print docs/models.md."""
    print(HEAD.format(count=len(FAMILIES), version=transformers.__version__))
    for family in FAMILIES:
        print(f"| {family} | {' | '.join(row(family))} |", flush=True)
    print(SEQ2SEQ_HEAD.format(count=len(SEQ2SEQ)))
    for family in SEQ2SEQ:
        print(f"| {family}, with its encoder | {' | '.join(row(family, with_encoder=True))} |", flush=True)


if __name__ == "__main__":
    main()
