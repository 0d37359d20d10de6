"""Random models of two layers with dropout, trainers around them, and ragged batches of tokens."""

import copy

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

VOCABULARY, EOS, CONTEXT = 40, 1, 512
KINDS = ("gpt2", "llama")


def network(kind="gpt2", vocabulary=VOCABULARY, **settings):
    """A transformers model with dropout; a large initialisation tells tokens and positions apart."""
    torch.manual_seed(11)
    if kind == "gpt2":
        size = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
        config = GPT2Config(**{"initializer_range": 0.3, **size, **drop, **settings}, vocab_size=vocabulary)
        model = GPT2LMHeadModel(config)
    else:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        size |= {"max_position_embeddings": CONTEXT, "initializer_range": 0.3, "attention_dropout": 0.5}
        model = LlamaForCausalLM(LlamaConfig(**{**size, **settings}, vocab_size=vocabulary))
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.bos_token_id = config.pad_token_id = EOS
    return model


def policy(kind="gpt2", **settings):
    return AutoModelForCausalLMWithValueHead.from_pretrained(network(kind, **settings))


def lora(kind="gpt2", trained=True):
    """A policy with an adapter, one that already does something unless told otherwise."""
    from peft import LoraConfig

    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    settings = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(network(kind), peft_config=settings)
    if trained:
        shift_adapter(model)
    return model


def shift_adapter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))


def tokenizer(padding_side="left"):
    """One word a token: `w5` is token 5; the end-of-sequence token is also the padding."""
    words = {"<eos>" if i == EOS else f"w{i}": i for i in range(VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<eos>", unk_token="w0", padding_side=padding_side
    )


def trainer(model=None, ref_model=None, *, kind="gpt2", trainer_class=PPOTrainer, others=None, **settings):
    """A trainer over a batch of four with two epochs, unless the settings say otherwise."""
    settings = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-2, **settings}
    model = policy(kind) if model is None else model
    return trainer_class(PPOConfig(**settings), model, ref_model, **(others or {}))


def batch(queries=(3, 9, 5, 7), responses=(6, 2, 11, 4), vocabulary=VOCABULARY):
    """Ragged queries and responses of these lengths, and a score for each; tokens from 2 on, so never the end."""
    draw = torch.Generator().manual_seed(5)
    lists = [[torch.randint(2, vocabulary, (n,), generator=draw) for n in lengths] for lengths in (queries, responses)]
    return *lists, [float(s) for s in torch.randn(len(queries), generator=draw)]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def distance(first, second):
    """The largest difference between two sets of weights."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def snapshot(trainer):
    """Everything that an optimiser step may change."""
    return weights(trainer.model), copy.deepcopy(trainer.optimizer.state_dict())


def assert_untouched(trainer, before):
    state, optimizer = before
    assert distance(weights(trainer.model), state) == 0.0
    torch.testing.assert_close(trainer.optimizer.state_dict(), optimizer, rtol=0, atol=0)


def logprobs_alone(model, query, response, temperature=1.0):
    """The log-probs of a response computed by transformers from this one sequence, without padding, in fp64."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.cat([query, response])[None])[0].double()[0] / temperature
    model.train(was_training)
    scored = logits.log_softmax(-1)[len(query) - 1 : -1]
    return scored.gather(-1, response[:, None]).squeeze(-1)


def response_part(array, queries, responses):
    """The entries of a (B, L - 1) statistic that belong to the responses, one tensor per response."""
    rows = zip(torch.as_tensor(array), queries, responses, strict=True)
    return [row[len(q) - 1 : len(q) - 1 + len(r)] for row, q, r in rows]
