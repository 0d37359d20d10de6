"""Models and tokenizers small enough to build in a test."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import AutoModelForCausalLMWithValueHead

VOCABULARY = 40


def llama(tie=False, vocabulary=VOCABULARY, context=64, seed=0, **settings):
    torch.manual_seed(seed)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # large enough for the distribution to be far from uniform
    }
    return LlamaForCausalLM(LlamaConfig(**(config | settings))).eval()


def gpt2(vocabulary=VOCABULARY, context=64, seed=0, **settings):
    torch.manual_seed(seed)
    config = {
        "vocab_size": vocabulary,
        "n_positions": context,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return GPT2LMHeadModel(GPT2Config(**(config | settings))).eval()


def with_value_head(model):
    torch.manual_seed(1)
    return AutoModelForCausalLMWithValueHead(model)


def tokenizer(vocabulary=VOCABULARY):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def queries(count, seed=0, longest=9, vocabulary=VOCABULARY):
    """Return `count` prompts of 1 to `longest` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
