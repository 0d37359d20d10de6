"""A model of bytes that says what a test wants it to say, through the engine's own passes and caches."""

from functools import cache

import tiny
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fastppo.engine import engine as engine_module
from fastppo.engine.requests import Draw
from fastppo.engine.sampler import Sampler

VOCABULARY = 300


def tokenizer(added=("<|im_start|>", "<|im_end|>"), eos="</s>", template=None):
    """Bytes, one merge (`ab` is one token), a BOS that is put before every text, and an EOS."""
    words = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {"ab": 256, "<s>": 257, "</s>": 258} | {name: 259 + i for i, name in enumerate(added)}
    core = Tokenizer(BPE(words, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    result = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<s>")
    result.add_special_tokens({"additional_special_tokens": list(added)})
    result.chat_template = template
    return result


def new_model(context=600):
    """A tiny Llama with a value head whose vocabulary is the tokenizer's."""
    return tiny.with_value_head(tiny.llama(vocabulary=VOCABULARY, context=context, eos_token_id=258))


@cache
def model(context=600):
    """One that is not trained, probed once for all tests."""
    return new_model(context)


def say(monkeypatch, texts):
    """Have request i write `texts[i]`, a text or token ids; at each place of its response the token there.

    What a tool writes belongs into the text too, at its place. Records are those of the tokens that are said.
    """
    codec = tokenizer()
    scripts = [codec(t, add_special_tokens=False)["input_ids"] if isinstance(t, str) else t for t in texts]

    def draw_at(self, hidden, places, may_be_early):
        numbers, positions = places[0].tolist(), places[1].tolist()
        tokens = torch.tensor([scripts[n % len(scripts)][p] for n, p in zip(numbers, positions, strict=True)])
        logps = self.head.weight.float() @ hidden.float().T / self.sampling.temperature
        logps = logps.T.log_softmax(-1)
        values = None if self.value_head is None else self.value_head(hidden).squeeze(-1)
        entropies = -(logps.exp() * logps).sum(-1)
        return Draw(tokens, logps.gather(-1, tokens[:, None]).squeeze(-1), entropies, torch.ones(len(tokens)), values)

    monkeypatch.setattr(Sampler, "draw_at", draw_at)
    monkeypatch.setattr(engine_module, "loop_of", lambda step, sampler: None)  # it draws by itself
    return scripts
