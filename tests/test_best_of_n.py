"""Best of n: which candidates are drawn, how they are scored, and which come back in which order."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

from fastppo import BestOfNSampler, Engine, LengthSampler, SamplingConfig
from fastppo.rewards import guard

QUERIES = [[5, 6, 7], [8], [9, 10]]


def make(reward, length=6, model=None, **settings):
    settings = {"sample_size": 4, "seed": 3} | settings
    return BestOfNSampler(model or tiny.llama(), tiny.tokenizer(), reward, lambda: length, **settings)


def number_of(texts):
    """A score that no two texts share by accident, and that is not monotonous in their place."""
    return [float(sum((i + 1) * int(word[1:]) ** 2 % 97 for i, word in enumerate(text.split()))) for text in texts]


def candidates(sample_size=4, length=6, seed=3):
    """The texts that the engine draws, by hand: the n of a query side by side."""
    engine = Engine(tiny.llama(), tiny.tokenizer(), seed=seed)
    rollout = engine.generate(QUERIES, SamplingConfig(max_new_tokens=length), n=sample_size)
    whole = [torch.cat(pair).tolist() for pair in zip(rollout.queries, rollout, strict=True)]
    texts = tiny.tokenizer().batch_decode(whole, skip_special_tokens=True)
    return [texts[i : i + sample_size] for i in range(0, len(texts), sample_size)]


@pytest.mark.parametrize(("size", "best"), [(1, 1), (4, 1), (4, 4), (5, 2)])
def test_the_best_of_the_candidates_come_back_best_first(size, best):
    sampler = make(number_of, sample_size=size, n_candidates=best)
    texts, scores = sampler.generate(QUERIES, return_scores=True)
    expected = [sorted(group, key=lambda text: -number_of([text])[0])[:best] for group in candidates(size)]
    assert texts == expected
    assert scores == [number_of(group) for group in expected]
    assert make(number_of, sample_size=size, n_candidates=best).generate(QUERIES) == expected
    assert sampler.engine.metrics()["prefill_tokens"] == sum(map(len, QUERIES))  # each prompt once


@pytest.mark.parametrize(
    "query",
    [QUERIES, [torch.tensor(ids) for ids in QUERIES], ["w5 w6 w7", "w8", "w9 w10"]],
)
def test_queries_of_every_form(query):
    assert make(number_of).generate(query) == make(number_of).generate(QUERIES)


@pytest.mark.parametrize("query", [[5, 6, 7], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), "w5 w6 w7"])
def test_one_query_is_answered_by_a_list_of_one(query):
    assert make(number_of).generate(query) == make(number_of).generate(QUERIES[:1])


def test_rewards_of_every_kind():
    whole = candidates()
    prompts = ["w5 w6 w7", "w8", "w9 w10"]
    tails = [[text.removeprefix(p).strip() for text in group] for p, group in zip(prompts, whole, strict=True)]

    def best(score):
        return [[max(group, key=lambda pair: score(*pair))[0]] for group in map(zip, whole, tails)]

    def of_completions(completions):
        return number_of(completions)

    def of_both(prompts, completions, prompt_ids, completion_ids):
        for ids, texts in ((prompt_ids, prompts), (completion_ids, completions)):
            assert tiny.tokenizer().batch_decode(ids, skip_special_tokens=True) == texts
        return [-score for score in number_of(completions)]

    async def later(texts):
        return number_of(texts)

    whole_score, tail_score = (lambda text, tail: number_of([text])[0]), (lambda text, tail: number_of([tail])[0])
    for reward, score in (
        (number_of, whole_score),
        (later, whole_score),
        (guard(number_of, timeout=None, clip=1e6), whole_score),
        (of_completions, tail_score),
        (of_both, lambda text, tail: -number_of([tail])[0]),
        ([of_completions, number_of_words], lambda text, tail: number_of([tail])[0] - 50 * len(tail.split())),
        (guard(of_completions, batch_size=2), tail_score),
    ):
        assert make(reward).generate(QUERIES) == best(score)


def number_of_words(completions):
    return [-50 * len(text.split()) for text in completions]


def test_candidates_without_a_score_are_no_candidates():
    def some(texts):
        return [None if i % 4 < 3 else 1.0 for i in range(len(texts))]

    assert make(some, n_candidates=2).generate(QUERIES) == [[group[3]] for group in candidates()]
    with pytest.raises(ValueError, match="none of the 4 candidates of query 1 has a score"):
        make(lambda texts: [None if 4 <= i < 8 else 0.0 for i in range(len(texts))]).generate(QUERIES)
    with pytest.raises(ValueError, match="reward <lambda>: got 11 scores for 12 responses"):
        make(lambda texts: [0.0] * (len(texts) - 1)).generate(QUERIES)


def test_of_equals_the_first_drawn_comes_first():
    assert make(lambda texts: [0.0] * len(texts), n_candidates=3).generate(QUERIES) == [g[:3] for g in candidates()]


def test_lengths_are_drawn_for_each_query():
    lengths = iter([2, 5, 3])
    sampler = BestOfNSampler(tiny.llama(), tiny.tokenizer(), number_of, lambda: next(lengths), seed=3)
    texts = sampler.generate([[5], [5], [5]], stop_ids=())
    assert [len(group[0].split()) for group in texts] == [1 + 2, 1 + 5, 1 + 3]
    drawn = BestOfNSampler(tiny.with_value_head(tiny.llama()), tiny.tokenizer(), number_of, LengthSampler(2, 4))
    assert len(drawn.generate(torch.tensor([5]), device="cpu")) == 1


def test_the_generation_config_says_how_to_sample_and_arguments_override_it():
    config = GenerationConfig(do_sample=True, temperature=1e-4, max_length=3, pad_token_id=0, min_length=-1, top_k=0)
    cold = make(number_of, generation_config=config, n_candidates=4).generate(QUERIES)
    greedy = make(number_of, sample_size=1).generate(QUERIES, do_sample=False)
    assert cold == [group * 4 for group in greedy]
    warm = make(number_of, generation_config=config, n_candidates=4).generate(QUERIES, temperature=1.0)
    assert sorted(map(sorted, warm)) == sorted(map(sorted, candidates()))


def test_seeds():
    drawn = [make(number_of, seed=seed).generate(QUERIES) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    model = tiny.llama()  # making it sets torch's seed
    torch.manual_seed(4)
    drawn = [make(number_of, model=model, seed=None).generate(QUERIES) for _ in range(2)]
    torch.manual_seed(4)
    assert drawn[0] == make(number_of, model=model, seed=None).generate(QUERIES) != drawn[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_candidates": 5}, r"n_candidates must be from 1 to sample_size \(4\), got 5"),
        ({"n_candidates": 0}, "n_candidates must be from 1 to"),
        ({"sample_size": 0}, r"n_candidates must be from 1 to sample_size \(0\)"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(number_of, **settings)


def test_arguments_that_contradict_are_refused():
    with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer, got NoneType"):
        BestOfNSampler(tiny.llama(), None, number_of, lambda: 4)
    with pytest.raises(ValueError, match="length_sampler must be a function without arguments, got 4"):
        BestOfNSampler(tiny.llama(), tiny.tokenizer(), number_of, 4)
    with pytest.raises(ValueError, match="do_sample=False draws the same text 4 times"):
        make(number_of).generate(QUERIES, do_sample=False)
    for name in ("max_new_tokens", "num_return_sequences"):
        with pytest.raises(ValueError, match=f"{name}=9 is for the sampler's"):
            make(number_of).generate(QUERIES, **{name: 9})
    with pytest.raises(ValueError, match="a reward must be a callable"):
        make(5)
