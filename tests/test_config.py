"""Settings: what is accepted, what is refused and in which words, and the translation of generation arguments."""

import dataclasses

import pytest

from fastppo.config import PPOConfig, SamplingConfig

# TRL 0.11.4's defaults of the settings that change a result.
TRL_DEFAULTS = {
    "steps": 20000,
    "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6.0,
    "horizon": 10000.0,
    "gamma": 1,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 128,
    "mini_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 4,
    "early_stopping": False,
    "target_kl": 1.0,
    "ratio_threshold": 10.0,
    "use_score_scaling": False,
    "use_score_norm": False,
    "score_clip": None,
    "whiten_rewards": False,
    "seed": 0,
}


def test_defaults_are_those_of_trl():
    config = PPOConfig()
    assert {name: getattr(config, name) for name in TRL_DEFAULTS} == TRL_DEFAULTS
    assert not config.is_compat
    config.check()


WRONG = [
    ("log_with", "mlflow", "one of wandb, tensorboard, trackio"),
    ("learning_rate", 0.0, "greater than 0"),
    ("critic_learning_rate", -1.0, "greater than 0"),
    ("learning_rate", float("nan"), "greater than 0"),
    ("learning_rate", "1e-5", "greater than 0"),  # what YAML makes of it
    ("learning_rate", None, "greater than 0"),
    ("warmup_steps", -1, "at least 0"),
    ("init_kl_coef", -0.1, "at least 0"),
    ("kl_penalty", "KL", "one of kl, abs, mse, full, k1, k2, k3"),
    ("target", 0, "greater than 0"),
    ("horizon", 0, "greater than 0"),
    ("gamma", 1.5, "between 0 and 1"),
    ("lam", -0.1, "between 0 and 1"),
    ("lam_critic", 2, "between 0 and 1"),
    ("cliprange", 0.0, "greater than 0 and at most 1"),
    ("cliprange", 1.2, "greater than 0 and at most 1"),
    ("cliprange_high", 0.0, "greater than 0"),
    ("cliprange_value", -0.2, "greater than 0"),
    ("vf_coef", -1.0, "at least 0"),
    ("loss_aggregation", "mean", "one of token-mean, sequence-mean"),
    ("batch_size", 0, "a whole number from 1"),
    ("batch_size", float("inf"), "a whole number from 1"),
    ("mini_batch_size", 1.5, "a whole number from 1"),
    ("gradient_accumulation_steps", 0, "a whole number from 1"),
    ("ppo_epochs", 0, "a whole number from 1"),
    ("max_grad_norm", 0.0, "greater than 0"),
    ("target_kl", 0.0, "greater than 0"),
    ("compare_steps", 0, "a whole number from 1"),
    ("ratio_threshold", 0.0, "greater than 0"),
    ("score_clip", 0.0, "greater than 0"),
    ("optim", "adamw", "one of adam, adamw_torch, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit"),
    ("weight_decay", -0.1, "at least 0"),
    ("overlong_prompts", "cut", "one of error, drop, truncate"),
    ("max_skipped_steps", 0, "a whole number from 1"),
    ("critic", "value", "one of head, adapter, full"),
    ("critic_warmup_steps", -1, "at least 0"),
    ("critic_init", "reward", "one of policy, reward_adapter"),
    ("consistency", "bitwise", "one of bounded, exact"),
    ("rescore_every", 0, "a whole number from 1"),
    ("importance_cap", 0.0, "greater than 0"),
    ("compat", "trl-0.11", "one of trl-0.7"),
]


@pytest.mark.parametrize(("name", "value", "expectation"), WRONG)
def test_check_names_the_setting_the_expectation_and_the_value(name, value, expectation):
    config = PPOConfig()
    setattr(config, name, value)  # mutable, as in TRL: only check() judges
    with pytest.raises(ValueError, match="PPOConfig") as caught:
        config.check()
    assert str(caught.value) == f"PPOConfig.{name} must be {expectation}, got {value!r}"


def test_every_limited_setting_has_a_case_above():
    from fastppo.rules import RULES

    assert {name for name, *_ in RULES} == {name for name, *_ in WRONG}


@pytest.mark.parametrize(
    ("batch_size", "mini_batch_size", "accumulated", "expected"),
    [(256, 128, 1, 128), (256, 64, 2, 64), (16, 128, 1, 16), (16, 128, 4, 4), (1, 128, 1, 1), (6, 2, 3, 2)],
)
def test_a_minibatch_is_no_larger_than_the_batch_allows(batch_size, mini_batch_size, accumulated, expected):
    config = PPOConfig(batch_size=batch_size, mini_batch_size=mini_batch_size, gradient_accumulation_steps=accumulated)
    config.check()
    assert config.micro_batch_size == expected
    assert config.mini_batch_size == mini_batch_size  # the user's own number stands
    assert config.backward_batch_size == config.global_backward_batch_size == expected * accumulated
    assert (config.world_size, config.global_batch_size) == (1, batch_size)
    before = dataclasses.asdict(config)
    config.check()
    assert dataclasses.asdict(config) == before


@pytest.mark.parametrize(("batch_size", "mini_batch_size", "accumulated"), [(10, 4, 1), (8, 2, 3), (2, 1, 4)])
def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(batch_size, mini_batch_size, accumulated):
    config = PPOConfig(batch_size=batch_size, mini_batch_size=mini_batch_size, gradient_accumulation_steps=accumulated)
    product = mini_batch_size * accumulated
    with pytest.raises(ValueError, match=rf"\({batch_size}\) .*\({mini_batch_size} \* {accumulated} = {product}\)"):
        config.check()


def test_old_names_are_adopted():
    config = PPOConfig(batch_size=8, forward_batch_size=4, optimize_cuda_cache=True)
    config.check()
    assert config.mini_batch_size == 4
    assert config.optimize_device_cache is True


def test_one_switch_turns_old_behaviour_on():
    config = PPOConfig(compat="trl-0.7")
    config.check()
    assert config.is_compat


def test_unknown_settings_fail():
    with pytest.raises(TypeError, match="learning_rat"):
        PPOConfig(learning_rat=1e-3)


def test_to_dict_is_flat():
    flat = PPOConfig(tracker_kwargs={"wandb": {"tags": ["a"]}}, lam=0.5).to_dict()
    assert flat["lam"] == 0.5
    assert flat["tracker_kwargs/wandb"] == {"tags": ["a"]}
    assert "tracker_kwargs" not in flat


def test_generation_arguments_of_trl_scripts():
    """The idiom of TRL's quick start, for pure sampling."""
    sampling = SamplingConfig.from_generation_kwargs(
        min_length=-1, top_k=0.0, top_p=1.0, do_sample=True, pad_token_id=2, eos_token_id=-1, max_new_tokens=32
    )
    assert sampling == SamplingConfig(max_new_tokens=32, stop_ids=(-1,))  # no token is -1: nothing stops early
    assert type(sampling.top_k) is int
    assert not sampling.is_truncated


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eos_token_id": 5}, {"stop_ids": (5,)}),
        ({"eos_token_id": [5, 6]}, {"stop_ids": (5, 6)}),
        ({"eos_token_id": 5, "stop_ids": (7,)}, {"stop_ids": (7,)}),
        ({"eos_token_id": None}, {"stop_ids": None}),
        ({"stop_strings": "END"}, {"stop_strings": ("END",)}),
        ({"stop_strings": ["a", "b"]}, {"stop_strings": ("a", "b")}),
        ({"min_new_tokens": -1}, {"min_new_tokens": 0}),
        ({"max_new_tokens": None, "temperature": None, "top_k": None}, {}),
        ({"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}, {"do_sample": False}),
        ({"remove_padding": True, "pad_to_multiple_of": 8, "bos_token_id": 1, "no_repeat_ngram_size": 0}, {}),
        ({"temperature": 0.7, "top_k": 40.0, "seed": 3}, {"temperature": 0.7, "top_k": 40, "seed": 3}),
    ],
)
def test_generation_arguments_are_translated(given, expected):
    assert SamplingConfig.from_generation_kwargs(**given) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    "given",
    [
        {"min_length": 5},
        {"num_beams": 4},
        {"num_return_sequences": 2},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"length_penalty": 0.5},
        {"typical_p": 0.9},
        {"output_scores": True},
        {"return_dict_in_generate": True},
    ],
)
def test_generation_arguments_that_change_the_distribution_are_refused(given):
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} would sample from another distribution.*leave it out"):
        SamplingConfig.from_generation_kwargs(**given)


def test_unknown_generation_arguments_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"max_tokens=5; known: .*'eos_token_id'.*'max_new_tokens'"):
        SamplingConfig.from_generation_kwargs(max_tokens=5)


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("min_new_tokens", 200, "between 0 and max_new_tokens"),
        ("min_new_tokens", -1, "between 0 and max_new_tokens"),
        ("temperature", 0.0, "use do_sample=False for greedy"),
        ("temperature", float("inf"), "greater than 0"),
        ("top_k", -1, "at least 0; 0 keeps all tokens"),
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.1, "greater than 0 and at most 1"),
    ],
)
def test_sampling_settings_are_checked_when_made(name, value, expectation):
    with pytest.raises(ValueError, match=rf"SamplingConfig\.{name} must be .*{expectation}.*, got {value!r}"):
        SamplingConfig(**{name: value})


def test_sampling_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().top_k = 5


@pytest.mark.parametrize(
    ("settings", "is_truncated"),
    [({}, False), ({"top_k": 5}, True), ({"top_p": 0.9}, True), ({"top_k": 5, "do_sample": False}, False)],
)
def test_is_truncated(settings, is_truncated):
    assert SamplingConfig(**settings).is_truncated is is_truncated
