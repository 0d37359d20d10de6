"""Two tasks for an encoder-decoder, made by rule, and a small T5 for them: numbers into words, and marked words copied.

The first is a translation, where every word has its counterpart; the second a summary, where most words have none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUNS = ("film", "plot", "actor", "music", "scene", "ending", "joke", "dialogue", "camera", "story")
MARK = "!"  # in front of a word: it belongs into the summary
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Pair:
    """What the encoder reads, and what the decoder should write."""

    source: str
    target: str


def translations(n: int, seed: int, longest: int = 3) -> list[Pair]:
    """Generate `n` numbers of 1 to `longest` digits, as "4 0 7", and in words.

    >>> translations(1, seed=1)
    [Pair(source='9', target='nine')]
    """
    rng = random.Random(seed)
    numbers = [[rng.randrange(10) for _ in range(rng.randint(1, longest))] for _ in range(n)]
    return [Pair(" ".join(map(str, number)), " ".join(DIGITS[digit] for digit in number)) for number in numbers]


def summaries(n: int, seed: int, words: int = 5, marked: int = 2) -> list[Pair]:
    """Generate `n` lists of `words` words, of which 1 to `marked` have a mark in front; those are the summary.

    >>> summaries(1, seed=0)
    [Pair(source='joke joke ! film ! scene camera', target='film scene')]
    """
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        text = [rng.choice(NOUNS) for _ in range(words)]
        chosen = sorted(rng.sample(range(words), rng.randint(1, marked)))
        source = [f"{MARK} {word}" if place in chosen else word for place, word in enumerate(text)]
        pairs.append(Pair(" ".join(source), " ".join(text[place] for place in chosen)))
    return pairs


def likeness(completion: str, target: str) -> float:
    """Return the share of places, of the longer of two texts, that have the same word: 1 if they are equal.

    >>> likeness("two nine nine", "two nine")
    0.6666666666666666
    """
    ours, theirs = completion.split(), target.split()
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return same / max(len(ours), len(theirs), 1)


def reward(prompts: Sequence[str], completions: Sequence[str], *, target: Sequence[str], **_: object) -> list[float]:
    """Score completions by their likeness to the data's column `target`."""
    return [likeness(completion, wanted) for completion, wanted in zip(completions, target, strict=True)]


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word of both tasks; like T5's it ends every text with </s>."""
    words = [*_SPECIAL_TOKENS, MARK, *map(str, range(10)), *DIGITS, *NOUNS]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    end = ("</s>", words.index("</s>"))
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> T5ForConditionalGeneration:
    """Return a T5 with random weights, some 250,000 of them."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
