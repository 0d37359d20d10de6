"""What TRL 0.7's update does wrong and ours does right, each named by the right behaviour."""

import gc
import math
from dataclasses import replace

import pytest
import tiny_trainers as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.ops import chunks
from fastppo.trainers import conclude, update
from fastppo.trainers import ppo as ppo_trainer

OPTIMIZERS = {
    "fused Adam": None,
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def experience_of(trainer, monkeypatch, *batch):
    """Take a step; return the experience that its update was given."""
    seen = []

    def spy(model, optimizer, experience, config, step):
        seen.append(experience)
        return update.optimise(model, optimizer, experience, config, step)

    monkeypatch.setattr(ppo_trainer, "optimise", spy)
    trainer.step(*batch)
    return seen[0]


# TRL defect 1
def test_gradients_are_clipped_on_every_optimiser_step():
    model = tiny.policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = tiny.trainer(model, others={"optimizer": optimizer}, mini_batch_size=2, max_grad_norm=1e-3)
    norms = []

    def note(*_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()))

    optimizer.register_step_pre_hook(note)
    trainer.step(*tiny.batch())
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


class LargestFloats(TorchDispatchMode):
    """Notes the largest floating-point tensor that any operation returns, and reads of floats by the host."""

    largest = reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.reads += 1
        return result


# TRL defect 10
@pytest.mark.parametrize("penalty", ["kl", "full"])
@pytest.mark.parametrize(("vocabulary", "longest"), [(5003, 120), (151_936, 420)])
def test_no_tensor_of_tokens_times_vocabulary_exists_in_a_step(monkeypatch, penalty, vocabulary, longest):
    if vocabulary < 100_000:  # the chunks of the large one are those of every day
        monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 2**16)
        monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 64)
    lengths = (longest - 20, longest, longest - 30, longest - 10)
    trainer = tiny.trainer(tiny.policy(vocabulary=vocabulary), kl_penalty=penalty, ppo_epochs=1)
    with LargestFloats() as seen:
        trainer.step(*tiny.batch(responses=lengths, vocabulary=vocabulary))
    assert vocabulary * 16 <= seen.largest <= chunks.chunk_rows(vocabulary) * vocabulary
    assert seen.largest <= sum(lengths) * vocabulary / 4


# TRL defect 11
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cause", ["large ratio", "infinite ratio", "NaN gradient"])
def test_a_skipped_minibatch_leaves_weights_and_optimiser_as_they_were(monkeypatch, kind, cause):
    model = tiny.policy()
    optimizer = OPTIMIZERS[kind](model.parameters()) if OPTIMIZERS[kind] else None
    trainer = tiny.trainer(model, others={"optimizer": optimizer}, mini_batch_size=2, max_grad_norm=1.0)
    experience = experience_of(trainer, monkeypatch, *tiny.batch())  # leaves momentum behind
    if cause == "large ratio":
        trainer.config.ratio_threshold = 1e-3
    elif cause == "infinite ratio":
        improbable = replace(experience.evaluation, logprobs=experience.evaluation.logprobs - 200)
        experience = replace(experience, evaluation=improbable)
    else:
        next(model.parameters()).register_hook(lambda grad: torch.full_like(grad, torch.nan))
    minibatch = replace(next(update.minibatches(experience.samples, trainer.config, 0, 0)), is_first=False)
    before = tiny.snapshot(trainer)
    terms = update.train_minibatch(model, trainer.optimizer, experience, minibatch, trainer.config)
    tiny.assert_untouched(trainer, before)
    assert bool(terms.skipped)
    assert bool(terms.nonfinite) == (cause == "NaN gradient") or cause == "infinite ratio"


# TRL defect 12
@pytest.mark.parametrize("case", ["one sample", "masked to one token"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a_batch_with_one_trained_token_keeps_everything_finite(case, whiten_rewards):
    queries, responses, scores = tiny.batch((3,), (1,)) if case == "one sample" else tiny.batch((3,), (4,))
    masks = [torch.tensor([0, 1, 0, 0])] if case != "one sample" else None
    trainer = tiny.trainer(batch_size=1, whiten_rewards=whiten_rewards, use_score_scaling=True, use_score_norm=True)
    before = tiny.weights(trainer.model)
    stats = trainer.step(queries, responses, scores, masks)
    after = tiny.weights(trainer.model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert tiny.distance(before, after) > 0
    assert stats["ppo/nonfinite_steps"] == 0
    assert all(math.isfinite(stats[f"ppo/loss/{name}"]) for name in ("policy", "value", "total"))


# TRL defect 13
@pytest.mark.parametrize("kind", ["empty", "masked"])
def test_an_untrainable_response_is_left_out_of_the_update(kind):
    queries, responses, scores = tiny.batch()
    masks = [torch.ones(len(response)) for response in responses]
    if kind == "empty":
        responses[1], masks[1] = responses[1][:0], masks[1][:0]
    else:
        masks[1] = torch.zeros(len(responses[1]))
    finals = []
    for score in (scores[1], 1000.0):
        trainer = tiny.trainer()
        scores[1] = score
        with pytest.warns(UserWarning, match="left 1 of 4 responses out"):
            stats = trainer.step(queries, responses, scores, masks)
        assert stats["ppo/dropped_samples"] == 1
        finals.append(tiny.weights(trainer.model))
    assert tiny.distance(*finals) == 0.0


def adam_free(model):
    """Plain gradient descent shows gradients as they are; Adam would hide a scale and amplify a rounding."""
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.05)}


def train_over_dataloader(mini_batch_size, accumulation):
    model = tiny.policy()
    queries, _, _ = tiny.batch([3, 9, 5, 7] * 3, [1] * 12)
    settings = {"mini_batch_size": mini_batch_size, "gradient_accumulation_steps": accumulation}
    others = adam_free(model) | {"dataset": [{"input_ids": q} for q in queries], "data_collator": list}
    trainer = tiny.trainer(model, others=others, **settings)
    steps, weights = [], []
    for number, rows in enumerate(trainer.dataloader):
        assert len(rows) == 4
        _, responses, scores = tiny.batch(responses=(number + 1, 12, 2, 6))
        stats = trainer.step([row["input_ids"] for row in rows], responses, scores)
        steps.append(stats["ppo/optimizer_steps"])
        weights.append(tiny.weights(trainer.model))
    return steps, weights


# TRL defect 14
# TRL defect 15
def test_accumulated_micro_batches_equal_one_large_one_at_every_place_of_a_dataloader():
    steps, weights = train_over_dataloader(4, 1)
    for mini_batch_size, accumulation in ((1, 4), (2, 2)):
        other_steps, other_weights = train_over_dataloader(mini_batch_size, accumulation)
        assert steps == other_steps == [2.0, 2.0, 2.0]
        for mine, others in zip(weights, other_weights, strict=True):
            assert tiny.distance(mine, others) < 1e-5


def plain_advantages(rewards, values, gamma, lam):
    """The definition, Σ_k (γλ)^k δ_{t+k}, of one list of consecutive tokens."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


# TRL defect 16
def test_tokens_of_a_tool_do_not_count_as_time(monkeypatch):
    masks = [torch.ones(6), torch.ones(2), torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1]), torch.ones(4)]
    trainer = tiny.trainer(gamma=0.9, lam=0.8)
    experience = experience_of(trainer, monkeypatch, *tiny.batch(), masks)
    lengths = [int(mask.sum()) for mask in masks]
    assert len(experience.returns) == sum(lengths)
    parts = zip(*(x.split(lengths) for x in (experience.rewards, experience.evaluation.values)), strict=True)
    expected = []
    for rewards, values in parts:
        advantages = plain_advantages(rewards.tolist(), values.tolist(), 0.9, 0.8)
        expected += [a + v for a, v in zip(advantages, values.tolist(), strict=True)]
    torch.testing.assert_close(experience.returns, torch.tensor(expected))


# TRL defect 19
@pytest.mark.filterwarnings("ignore:the KL from the reference")  # random tokens, not samples of the policy
@pytest.mark.parametrize("penalty", ["abs", "mse", "full", "k3"])
def test_the_kl_of_the_penalty_in_use_is_reported_beside_k1(penalty):
    queries, responses, scores = tiny.batch()
    model, reference = tiny.policy(), tiny.policy(initializer_range=0.2)
    stats = tiny.trainer(model, reference, kl_penalty=penalty, learning_rate=1e-9).step(queries, responses, scores)
    pairs = list(zip(queries, responses, strict=True))
    ratios = [tiny.logprobs_alone(model, *pair) - tiny.logprobs_alone(reference, *pair) for pair in pairs]
    assert stats["objective/kl"] == pytest.approx(sum(float(r.sum()) for r in ratios) / 4, rel=1e-4)
    formulas = {"abs": torch.abs, "mse": lambda s: s**2 / 2, "k3": lambda s: torch.exp(-s) - 1 + s}
    if penalty == "full":
        kls = [torch.distributions.kl_divergence(*distributions(model, reference, *pair)) for pair in pairs]
    else:
        kls = [formulas[penalty](ratio) for ratio in ratios]
    expected = sum(float(kl.sum()) for kl in kls) / 4
    assert stats[f"objective/kl_{penalty}"] == pytest.approx(expected, rel=1e-4)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * expected * 4 / 23, rel=1e-4)


def distributions(*models_and_pair):
    *models, query, response = models_and_pair
    ids = torch.cat([query, response])[None]
    for model in models:
        with torch.no_grad():
            logits = model.eval()(input_ids=ids)[0].double()[0, len(query) - 1 : -1]
        yield torch.distributions.Categorical(logits=logits)


class NotingController:
    """A controller of the user's own, which remembers what it was told."""

    value = 0.1

    def __init__(self):
        self.seen = []

    def update(self, current, n_steps):
        self.seen.append((current, n_steps))


# TRL defect 20
def test_a_kl_that_cannot_be_one_is_said_aloud_and_kept_from_the_controller():
    # Uniform tokens look improbable to the policy and less so to the flatter reference.
    trainer = tiny.trainer(tiny.policy(), tiny.policy(initializer_range=0.2))
    trainer.kl_ctl = NotingController()
    with pytest.warns(UserWarning, match="cannot be negative"):
        stats = trainer.step(*tiny.batch())
    assert stats["objective/kl"] < -1
    assert trainer.kl_ctl.seen == []  # what cannot be a KL must not lower the coefficient


# TRL defect 21
def test_early_stopping_looks_at_every_minibatch():
    settings = {"mini_batch_size": 1, "ppo_epochs": 3, "learning_rate": 3e-2}
    terms = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer, "optimise", lambda *a: terms.extend(update.optimise(*a)) or terms)
        tiny.trainer(**settings).step(*tiny.batch())
    kls = [float(minibatch.stats["policy/policykl"]) for minibatch in terms]
    assert len(kls) == 12
    last = next(i for i, kl in enumerate(kls) if kl > 0.01)
    assert last % 4 != 3, "the case must stop inside an epoch"
    stats = tiny.trainer(early_stopping=True, target_kl=0.01 / 1.5, **settings).step(*tiny.batch())
    assert stats["ppo/optimizer_steps"] == last + 1


# TRL defect 27
def test_no_gradient_is_kept_between_steps():
    trainer = tiny.trainer()
    trainer.step(*tiny.batch())
    assert [name for name, p in trainer.model.named_parameters() if p.grad is not None] == []


# TRL defect 28
def test_a_minibatch_reads_no_number_back_and_empties_no_cache(monkeypatch):
    collected, emptied = [], []
    monkeypatch.setattr(gc, "collect", lambda *a: collected.append(a))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    trainer = tiny.trainer(mini_batch_size=1, optimize_device_cache=True, max_grad_norm=1.0)
    experience = experience_of(trainer, monkeypatch, *tiny.batch())
    with LargestFloats() as seen:
        for minibatch in update.minibatches(experience.samples, trainer.config, 1, 0):
            update.train_minibatch(trainer.model, trainer.optimizer, experience, minibatch, trainer.config)
    assert seen.reads == 0
    monkeypatch.setattr(conclude.torch.cuda, "is_available", lambda: True)
    conclude.conclude(trainer, {"objective/kl": 0.0, "ppo/mean_scores": 0.0}, [])
    assert (len(collected), len(emptied)) == (0, 1)
