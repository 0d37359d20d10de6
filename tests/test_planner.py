"""The planner: counting live tensors, plans against hand counts and real runs, and what it advises."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoConfig, LlamaConfig, MixtralConfig

from benchmarks import plan_side
from benchmarks.plan_cases import Case
from fastppo import PPOConfig, PPOTrainer
from fastppo.cli import main
from fastppo.ops.backends import backend, rehearsing
from fastppo.planner import Work, advice
from fastppo.planner.live import LiveBytes
from fastppo.planner.network import Weights, build, twin
from fastppo.trainers.rehearsal import Rehearsal

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
}  # fmt: skip
H, INNER, V, LAYERS, KV = 64, 176, 1000, 2, 32
LINEARS = LAYERS * (2 * H * H + 2 * H * KV + 3 * H * INNER)  # weights of attention and feed-forward
NORMS = (2 * LAYERS + 1) * H
ROPE = 2 * 8 * 4  # bytes of the frequencies that transformers keeps twice, of 16 / 2 angles


def plan_of(weights=None, **settings):
    config = PPOConfig(batch_size=4, **settings)
    return Rehearsal(build(AutoConfig.for_model(**SMALL), weights or Weights(), config)).plan(Work(20, 12, config))


def test_a_storage_counts_once_and_until_it_is_freed():
    with LiveBytes("cpu") as live:
        a = torch.zeros(1000)
        b = a[10:].view(-1, 9)
        assert live.bytes == 4000
        del a
        assert live.bytes == 4000  # b lives in it
        c = torch.zeros(500, dtype=torch.float64)
        del b, c
        assert (live.bytes, live.peak) == (0, 8000)
        torch.zeros(10).resize_(100)
        assert (live.bytes, live.peak) == (0, 8000)


def test_labels_add_up_at_the_peak():
    x = torch.zeros(50, 20, requires_grad=True)
    with LiveBytes("cpu", wide=30) as live, live.keeping("activations"):
        with live.labelled("buffer"):
            buffer = torch.zeros(7)
        logits = torch.zeros(5, 30)
        y = (x * 2).exp()  # exp keeps its result, the product is gone
        y.sum().backward()
    assert sum(live.at_peak.values()) == live.peak
    assert (live.at_peak["buffer"], live.at_peak["head"]) == (buffer.nbytes, logits.nbytes)
    assert live.at_peak["activations"] == y.nbytes


def test_a_limit_is_kept():
    with pytest.raises(MemoryError, match="more than the limit of 1000"), LiveBytes("cpu", limit=1000):
        torch.zeros(251)


def test_what_stays_is_counted_by_hand():
    base = 4 * (LINEARS + 2 * V * H + NORMS) + ROPE
    items = plan_of().phases["update"]
    head = 4 * (H + 1)
    assert (items["base weights"], items["value head"]) == (base, head)
    assert items["reference"] == base + head
    assert items["optimiser"] == 2 * (base + head - ROPE)


def test_what_a_critic_adds_is_counted_by_hand():
    lora = Weights(lora_r=4, lora_targets="all-linear")
    ranks = LAYERS * (2 * (H + H) + 2 * (H + KV) + 3 * (H + INNER))
    items = plan_of(lora, critic="adapter", critic_peft_config={"r": 2}).phases["update"]
    assert (items["adapters"], items["critic"]) == (4 * 4 * ranks, 4 * 2 * ranks)
    assert items["optimiser"] == 8 * (6 * ranks + H + 1)
    items = plan_of(critic="full").phases["update"]
    network = LINEARS + V * H + NORMS  # its head is the policy's
    assert items["critic"] == 4 * network + ROPE
    assert items["optimiser"] == 8 * (2 * network + V * H + H + 1)


def test_a_critic_that_cannot_be_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="8-bit and 4-bit weights cannot be; set critic='adapter'"):
        plan_of(Weights(bits=4, lora_r=2, lora_targets="all-linear"), critic="full")
    with pytest.raises(ValueError, match="the model has none"):
        plan_of(critic="adapter")


def test_half_precision_has_masters():
    trained = LINEARS + 2 * V * H + NORMS
    items = plan_of(Weights(bf16=True)).phases["update"]
    assert items["base weights"] == 2 * trained + ROPE
    assert items["optimiser"] == 12 * trained + 8 * (H + 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_codes_and_scales(bits):
    outputs = LAYERS * (2 * H + 2 * KV + 2 * INNER + H)
    scales = outputs if bits == 8 else LINEARS // 64 + 7 * LAYERS * 16  # a table of what codes are beside each weight
    items = plan_of(Weights(bits=bits, lora_r=4, lora_targets="all-linear")).phases["rollout"]
    assert items["base weights"] == LINEARS * bits // 8 + 4 * scales + 4 * (2 * V * H + NORMS) + ROPE
    ranks = 4 * LAYERS * (2 * (H + H) + 2 * (H + KV) + 3 * (H + INNER))
    assert items["adapters"] == 4 * ranks
    assert items["optimiser"] == 8 * (ranks + H + 1)
    assert "reference" not in items


def test_the_cache_has_whole_blocks_for_all_rows():
    blocks = 4 * 2  # 4 samples of 20 + 12 tokens, 16 to a block
    assert plan_of().phases["rollout"]["kv cache"] == blocks * 16 * LAYERS * 2 * KV * 4


RUNS = [
    Case("full", SMALL, 6, 40, 40),
    Case("adapter, bf16", SMALL, 8, 33, 50, 8, "all-linear", ppo={"bf16": True}),
    Case("checkpointing", SMALL | {"num_hidden_layers": 4}, 6, 60, 40, ppo={"gradient_checkpointing": True}),
    Case(
        "padded", {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000}, 6, 40, 40
    ),
    Case("accumulated", SMALL, 8, 21, 60, ppo={"mini_batch_size": 2, "gradient_accumulation_steps": 2}),
    Case("8-bit moments", SMALL, 6, 40, 40, ppo={"optim": "adamw_8bit"}),
    Case("8-bit base", SMALL, 6, 40, 40, 8, "all-linear", bits=8),
    Case("4-bit base", SMALL, 6, 40, 40, 8, "all-linear", bits=4),
    Case(
        "critic on a small adapter, 8-bit base", SMALL, 6, 40, 40, 8, "all-linear", bits=8,
        ppo={"critic": "adapter", "critic_peft_config": {"r": 2}, "kl_penalty": "full"},
    ),
    Case("critic of its own", SMALL, 6, 40, 40, ppo={"critic": "full"}),
]  # fmt: skip
SLOW = [
    Case("critic on an adapter", SMALL, 6, 40, 40, 8, "all-linear", ppo={"critic": "adapter"}),
    Case("critic of its own, bf16, adapter", SMALL, 6, 40, 40, 8, "all-linear", ppo={"critic": "full", "bf16": True}),
    Case("detached head", SMALL, 6, 40, 40, 8, "all-linear", ppo={"critic_detach": True}),
    Case("4-bit base, critic on an adapter, checkpointing", SMALL, 6, 40, 40, 8, "all-linear", bits=4,
         ppo={"critic": "adapter", "gradient_checkpointing": True}),
]  # fmt: skip


def case_of(case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case in SLOW else [])


@pytest.mark.parametrize("case", [case_of(case) for case in [*RUNS, *SLOW]])
def test_a_plan_is_what_a_run_takes(case):
    with LiveBytes("cpu") as live:
        measured = max(plan_side.run(case, live).values())
    assert plan_side.predict(case).peak == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
def test_the_largest_response_runs_and_a_longer_one_does_not():
    case = Case("long", SMALL, 2, 500, 1)
    memory = plan_side.predict(replace(case, response=1200)).peak

    def needed(length):
        return advice.needed(plan_side.predict(replace(case, response=length)))

    longest = advice.largest(needed, memory, 3000)
    assert 900 < longest < 1200
    with LiveBytes("cpu", memory) as live:
        plan_side.run(replace(case, response=longest), live)
    with LiveBytes("cpu", memory) as live, pytest.raises(MemoryError):
        plan_side.run(replace(case, response=longest * 5 // 4), live)


@pytest.mark.parametrize(("memory", "expected"), [(99, 0), (100, 1), (5050, 50), (10**9, 4000)])
def test_the_largest_is_found_to_one_percent(memory, expected):
    found = advice.largest(lambda n: 100 * n if n < 30 else 100 * n + 49, memory, 4000)
    assert found == pytest.approx(expected, rel=0.01)


def test_a_twin_is_planned_as_its_configuration_and_copies_nothing():
    from transformers import LlamaForCausalLM

    model = tiny.with_value_head(LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})))
    trainer = PPOTrainer(PPOConfig(batch_size=4), model, num_shared_layers=1)
    twin(trainer.model, trainer.ref_model)  # what the probe and the fusions find is remembered
    with LiveBytes("cpu") as live:
        network = twin(trainer.model, trainer.ref_model)
    assert live.peak < 0.1 * sum(p.nbytes for p in model.parameters())
    shared = {id(p) for p in network.model.parameters()} & {id(p) for p in network.reference.parameters()}
    assert len(shared) == sum(not p.requires_grad for p in model.parameters())
    items = Rehearsal(network).plan(Work(20, 12, trainer.config)).phases["update"]
    whole = plan_of().phases["update"]
    assert items["base weights"] == whole["base weights"]
    assert items["reference"] < whole["reference"]


def test_a_rehearsal_leaves_the_kernels_as_they_were():
    before = backend(torch.device("cpu")), backend(torch.device("meta"))
    with rehearsing("cpu", 0):
        assert backend(torch.device("meta")) == before[0]
    assert (backend(torch.device("cpu")), backend(torch.device("meta"))) == before


def test_a_model_that_looks_at_its_numbers_is_refused():
    small = {key: value for key, value in SMALL.items() if key != "model_type"}
    config = PPOConfig(batch_size=4)
    network = build(MixtralConfig(**small, num_local_experts=2, experts_implementation="eager"), Weights(), config)
    with pytest.raises(NotImplementedError, match="MixtralForCausalLM cannot be planned"):
        Rehearsal(network).plan(Work(20, 12, config))


def test_quantised_weights_need_an_adapter():
    with pytest.raises(ValueError, match="set lora_r"):
        plan_of(Weights(bits=8))


@pytest.fixture
def directory(tmp_path):
    AutoConfig.for_model(**SMALL).save_pretrained(tmp_path)
    return str(tmp_path)


FLAGS = ["--prompt", "20", "--response", "12", "--batch", "4"]


def test_the_command_prints_json(directory, capsys):
    assert main(["plan", directory, *FLAGS, "--memory", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = plan_of()
    assert found["fits"]
    assert (found["peak_bytes"], found["memory_bytes"]) == (plan.peak, 10**9)
    assert found["phases"]["update"] == plan.phases["update"]
    assert found["largest_batch"] >= 4
    assert found["best_setting"]["peak_bytes"] < plan.peak


def test_the_command_says_what_is_missing(directory, capsys):
    assert main(["plan", directory, *FLAGS, "--memory", "1MB"]) == 1
    shown = capsys.readouterr().out
    for part in ("base weights", "kv cache", "optimiser", "lacks 0.00", "largest batch     none fits", "--lora_r 16"):
        assert part in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "plenty"], "memory must be a number of bytes such as 24GB, 16GiB or 8000000000, got 'plenty'"),
        (["--prompt", "4090", "--response", "100"], "4090 + 100 tokens, but the model's context is 4096"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--load_in_8bit"], "set lora_r"),
        (["--device", "cuda"], "say how much it has: --memory 24GB"),
    ],
)
def test_bad_input_is_named(directory, capsys, flags, message):
    assert main(["plan", directory, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_reports_the_plan_beside_the_peak(tmp_path):
    trainer = PPOTrainer(PPOConfig(batch_size=4), tiny.with_value_head(tiny.llama()))
    trainer.train([[5, 9], [11]], lambda completions: [0.0] * 4, max_steps=1, max_new_tokens=8, output_dir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = Rehearsal(twin(trainer.model, trainer.ref_model)).plan(Work(2, 8, trainer.config))
    assert summary["planned_peak_bytes"] == expected.peak
    assert summary["measured_peak_bytes"] > sum(p.nbytes for p in trainer.model.parameters())


def test_a_run_that_will_not_fit_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.trainers.forecast.free_bytes", lambda device: 1000)
    trainer = PPOTrainer(PPOConfig(batch_size=4), tiny.with_value_head(tiny.llama()))
    with pytest.warns(UserWarning, match=r"expected to take 0\.00 GB \(update\).*`fastppo plan` finds settings"):
        trainer.train([[5]], lambda completions: [0.0] * 4, max_steps=1, max_new_tokens=4, output_dir=tmp_path)
