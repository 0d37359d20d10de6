"""A T5 with random weights learns small tasks from a reward alone."""

import doctest

import pytest

from fastppo import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from fastppo.demo import pairs


def learn(data, steps, batch_size, **options):
    """Train; return the mean rewards of the steps, and the share of held-out first words that are right, greedily."""
    tokenizer = pairs.new_tokenizer()
    model = AutoModelForSeq2SeqLMWithValueHead(pairs.new_model(tokenizer))
    config = PPOConfig(
        batch_size=batch_size,
        mini_batch_size=batch_size // 2,
        learning_rate=2e-3,
        critic_learning_rate=5e-3,
        init_kl_coef=0.0,
        lam=1.0,
        entropy_coef=0.02,
        lr_scheduler_type="linear",
    )
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    rows = [{"prompt": pair.source, "target": pair.target} for pair in data[100:]]
    history = trainer.train(rows, pairs.reward, max_steps=steps, console=False, **options)
    held_out = data[:100]
    rollout = trainer.engine.generate([pair.source for pair in held_out], do_sample=False, **options)
    words = tokenizer.batch_decode([response[:1].tolist() for response in rollout])
    right = sum(word == pair.target.split()[0] for word, pair in zip(words, held_out, strict=True))
    return [stats["env/reward_mean"] for stats in history], right / len(held_out)


def test_a_word_is_learned_where_the_first_token_is_all_there_is():
    rewards, right = learn(pairs.translations(1100, seed=0, longest=1), steps=12, batch_size=128, max_new_tokens=1)
    assert rewards[0] < 0.1
    assert sum(rewards[-3:]) / 3 > 0.2, "one word for all numbers would be right in a tenth of the cases"
    assert right > 0.15


@pytest.mark.slow
def test_numbers_are_translated():
    rewards, right = learn(pairs.translations(2100, seed=0, longest=2), steps=60, batch_size=256, max_new_tokens=3)
    assert rewards[0] < 0.05
    assert sum(rewards[-5:]) / 5 > 0.45
    assert right > 0.6


@pytest.mark.slow
def test_marked_words_are_copied():
    data = pairs.summaries(2100, seed=0, words=3, marked=1)
    rewards, right = learn(data, steps=80, batch_size=256, max_new_tokens=2)
    assert rewards[0] < 0.05
    assert sum(rewards[-5:]) / 5 > 0.3
    assert right > 0.25


def test_the_tasks_are_what_they_say():
    assert doctest.testmod(pairs).failed == 0
    tokenizer = pairs.new_tokenizer()
    for pair in [*pairs.translations(20, seed=3), *pairs.summaries(20, seed=3)]:
        assert tokenizer.unk_token_id not in tokenizer(f"{pair.source} {pair.target}")["input_ids"]
        assert pairs.likeness(pair.target, pair.target) == 1.0
    marked = pairs.summaries(50, seed=4, words=6, marked=3)
    assert {len(pair.target.split()) for pair in marked} == {1, 2, 3}
    for pair in marked:
        words = pair.source.split()
        assert [words[i + 1] for i, word in enumerate(words) if word == pairs.MARK] == pair.target.split()
