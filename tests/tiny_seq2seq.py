"""Random encoder-decoders of two layers with dropout, whose decoders are none of their encoders' size."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fastppo import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

VOCABULARY, PAD, END = 40, 0, 1
_T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.3}
_BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "init_std": 0.3}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 56, "max_position_embeddings": 64}
_BART |= {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1, "encoder_layerdrop": 0.5}
_BART |= {"decoder_layerdrop": 0.5, "forced_eos_token_id": None}
# Of each family what makes it different: T5 scales before a tied head, UMT5 has a bias in every layer, BART and its
# descendants have positions and a bias of the logits, mBART is told its language, Marian starts with padding.
FAMILIES = {
    "t5": _T5,
    "t5 v1.1": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": _T5,
    "bart": _BART | {"decoder_start_token_id": END},
    "mbart": _BART | {"decoder_start_token_id": END, "forced_bos_token_id": 7},
    "pegasus": _BART | {"scale_embedding": True},
    "marian": _BART | {"decoder_vocab_size": VOCABULARY, "scale_embedding": True},
}
QUICK = ("t5", "mbart")
CASES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def network(family="t5", **settings):
    """A transformers model, evaluating, whose logits are far from uniform."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    config = AutoConfig.for_model(family.split()[0], **(common | FAMILIES[family] | settings))
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        if "t5" in family:  # its embeddings, tied, would choose the same token always
            model.get_decoder().final_layer_norm.weight.mul_(torch.randn(config.d_model) * 2)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(std=0.5)
    return model


def policy(family="t5", **settings):
    torch.manual_seed(4)
    return AutoModelForSeq2SeqLMWithValueHead(network(family, **settings))


def queries(lengths=(5, 11, 1, 8, 3, 11, 2, 7), seed=0):
    """Prompts of these lengths; ids of padding and of the end are tokens like all others."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def prefix(model):
    """What the decoder begins with, from the configuration alone."""
    config = model.config
    forced = getattr(config, "forced_bos_token_id", None)
    return torch.tensor([config.decoder_start_token_id] + ([] if forced is None else [forced]))


def plain(model, query, response, temperature=1.0):
    """Log-probs (R,) and hidden states (R, H) by transformers' own forward of one sample, differentiable."""
    start = prefix(model)
    ids = torch.cat([start, response[:-1]])[None]
    output = model(input_ids=query[None], decoder_input_ids=ids, use_cache=False, output_hidden_states=True)
    table = (output.logits[0, len(start) - 1 :] / temperature).log_softmax(-1)
    hidden = output.decoder_hidden_states[-1][0, len(start) - 1 :]
    return table[torch.arange(len(response)), response], hidden


def trainer(model, **settings):
    others = {name: settings.pop(name) for name in ("ref_model", "tokenizer", "optimizer") if name in settings}
    settings = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1, "learning_rate": 1e-3} | settings
    return PPOTrainer(PPOConfig(**settings), model, **others)
