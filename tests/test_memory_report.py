"""What lies in memory: one copy of the base for all parts, and a report that counts each storage once."""

import gc
import json

import pytest
import tiny_trainers as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.models.storages import Census, named_tensors
from fastppo.ops.chunks import LogitBuffer

# So that no batch here has as many tokens as a weight has rows.
ROWS = 101


def adapted(trained, width=88):
    from peft import LoraConfig

    from fastppo import AutoModelForCausalLMWithValueHead

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny.network("llama", vocabulary=ROWS, hidden_size=width, intermediate_size=2 * width), peft_config=config
    )
    if trained:
        tiny.shift_adapter(model)
    return model


def live_copies(shapes):
    """The places of live tensors that are as large as some weight of the base, by gc, whatever a report says."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr() for t in tensors if t.shape in shapes and t.is_floating_point()}


class Made(TorchDispatchMode):
    """Notes every tensor of one of the shapes that an operation makes, those that live for a moment too."""

    def __init__(self, shapes, known):
        super().__init__()
        self.shapes, self.known, self.made = shapes, known, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            is_like = isinstance(part, torch.Tensor) and part.shape in self.shapes and part.is_floating_point()
            if is_like and part.untyped_storage().data_ptr() not in self.known:
                self.made.append(str(function))
        return result


@pytest.mark.parametrize("trained", [False, True], ids=["adapter off", "frozen adapter"])
def test_policy_reference_and_critic_share_one_base(trained):
    """Before, during and after rollout and step; with a trained adapter to start from, it is the reference's."""
    # Of sizes of its own: another test's model may still be alive.
    trainer = tiny.trainer(adapted(trained, 96 + 8 * trained), mini_batch_size=2, ppo_epochs=1)
    base = [p for name, p in trainer.model.named_parameters() if "lora_" not in name and "v_head" not in name]
    places = {p.untyped_storage().data_ptr() for p in base}
    shapes = {p.shape for p in base if p.dim() == 2}
    assert live_copies(shapes) <= places, "before"
    reports, step = [trainer.memory_report()], trainer.optimizer.step
    seen = []

    def look():
        seen.append(live_copies(shapes) <= places)
        reports.append(trainer.memory_report())
        step()

    trainer.optimizer.step = look
    queries, _, scores = tiny.batch(vocabulary=ROWS)
    with Made(shapes, places) as during:
        rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=5)
        trainer.step(queries, rollout, scores)
    assert seen == [True] * 2
    assert not during.made
    assert live_copies(shapes) <= places, "after"
    reports.append(trainer.memory_report())
    expected = sum(p.nbytes for p in base)
    for report in reports:
        owned = [part for part in report.storages if part.owner == "base"]
        weights = [part for part in owned if "rotary" not in part.name]
        assert sum(part.bytes for part in weights) == expected
        assert {part.used_by for part in weights} == {("policy", "reference", "critic")}
        assert ("reference adapter" in report.by_owner()) == trained
        assert "reference copy" not in report.by_owner()


def test_the_oracle_sees_a_copy():
    model = adapted(False)
    weight = model.pretrained_model.get_base_model().model.layers[0].mlp.up_proj.weight
    copy = weight.detach().clone()
    assert len(live_copies({weight.shape})) == 5  # gate and up of both layers, and the copy
    with Made({weight.shape}, {weight.untyped_storage().data_ptr()}) as during:
        del copy
        _ = weight * 2
    assert len(during.made) == 1


def test_owners_of_a_full_model_and_its_copy():
    trainer = tiny.trainer(kind="gpt2")
    owners = trainer.memory_report().by_owner()
    size = sum(p.nbytes for p in trainer.model.pretrained_model.parameters())
    head = sum(p.nbytes for p in trainer.model.v_head.parameters())
    assert owners["base"] == size
    assert owners["value head"] == head
    assert owners["reference copy"] == size + head
    assert "optimiser state" not in owners
    trainer.optimizer.step = lambda step=trainer.optimizer.step: (inside.append(trainer.memory_report()), step())
    inside = []
    trainer.step(*tiny.batch())
    assert inside[0].by_owner()["gradients"] == size + head
    owners = trainer.memory_report().by_owner()
    assert "gradients" not in owners
    steps = 4 * len(list(trainer.model.parameters()))  # Adam counts each parameter's steps in a tensor
    assert owners["optimiser state"] == 2 * (size + head) + steps


def test_shared_layers_are_counted_once_and_shown_as_shared():
    trainer = tiny.trainer(kind="gpt2", others={"num_shared_layers": 1})
    report = trainer.memory_report()
    shared = [part for part in report.storages if part.used_by == ("policy", "critic", "reference")]
    inner = trainer.model.pretrained_model.transformer
    expected = [inner.wte, inner.wpe, inner.h[0]]
    assert sum(part.bytes for part in shared) == sum(p.nbytes for module in expected for p in module.parameters())
    assert {part.owner for part in shared} == {"base"}
    own = sum(p.nbytes for p in inner.h[1].parameters()) + sum(p.nbytes for p in inner.ln_f.parameters())
    head = sum(p.nbytes for p in trainer.model.v_head.parameters())
    assert report.by_owner()["reference copy"] == own + head  # the language-model head is the embedding


def test_masters_cache_and_other_tensors():
    trainer = tiny.trainer(kind="llama", bf16=True)
    mine = torch.zeros(12_345, dtype=torch.int16)
    queries, _, scores = tiny.batch()
    rollout = trainer.generate(queries, return_prompt=False, max_new_tokens=4)
    trainer.step(queries, rollout, scores)
    kept = trainer.engine.generate(queries, max_new_tokens=4, keep=True)
    report = trainer.memory_report()
    owners = report.by_owner()
    numbers = sum(p.numel() for p in trainer.model.pretrained_model.parameters())
    assert owners["fp32 masters"] == 4 * numbers
    assert owners["KV cache"] == sum(part.nbytes for part in trainer.engine.kv_tensors) > 0
    assert any(part.bytes == mine.nbytes and part.owner == "other tensors" for part in report.storages)
    trainer.engine.release()
    assert "KV cache" not in trainer.memory_report().by_owner()
    assert len(kept) == 4


def test_the_report_as_table_and_as_json():
    report = tiny.trainer(kind="gpt2").memory_report()
    lines = str(report).splitlines()
    assert lines[0].split() == ["owner", "storages", "bytes", "dtype", "device", "used", "by"]
    (base,) = [line for line in lines if line.startswith("base")]
    assert base.split()[1:5] == ["28", f"{report.by_owner()['base']:,}", "float32", "cpu"]
    assert lines[-1].split() == ["all", f"{len(report.storages):,}", f"{report.total:,}"]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["total"] == sum(part["bytes"] for part in plain["storages"]) == sum(plain["owners"].values())
    assert plain["storages"][0]["used_by"] == ["policy", "critic"]


def test_views_of_one_storage_are_counted_once():
    whole, census = torch.zeros(10, 10), Census()
    census.add("mine", "rollout", [("first", whole[:3]), ("second", whole[5:]), ("empty", torch.empty(0))])
    census.add("theirs", "update", [("again", whole.t())])
    (part,) = census.report().storages
    assert (part.owner, part.name, part.bytes, part.used_by) == ("mine", "first", 400, ("rollout", "update"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_scales_of_a_quantised_base_are_counted(bits):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = {
        4: lambda: Linear4bit(64, 48, bias=False, quant_type="nf4", compress_statistics=False),
        8: lambda: Linear8bitLt(64, 48, bias=False, has_fp16_weights=False),
    }
    layer = kinds[bits]().to("cpu")
    tensors = dict(named_tensors(torch.nn.Sequential(layer)))
    codes = tensors["0.weight"]
    assert codes.dtype in (torch.uint8, torch.int8)
    expected = 48 if bits == 8 else 64 * 48 // 64  # fp32 scales: one a row; one of 64 numbers
    assert any(tensor.numel() == expected and tensor.dtype == torch.float32 for tensor in tensors.values())
    with torch.no_grad():
        layer(torch.randn(2, 64))  # which moves the scales of 8-bit layers elsewhere
    again = Census()
    again.add("base", "policy", named_tensors(torch.nn.Sequential(layer)))
    sizes = sorted(part.bytes for part in again.report().storages)
    assert 4 * expected in sizes
    assert max(sizes) == codes.nbytes


def test_what_a_rollout_looked_at_is_let_go():
    """The decode program is made from the activations of a traced forward: none of them may stay."""
    from fastppo.engine.tracing import Trace

    trainer = tiny.trainer(kind="llama")
    trainer.generate(tiny.batch()[0], return_prompt=False, max_new_tokens=4)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Trace]


def test_the_logits_of_a_chunk_are_seen_while_they_live(monkeypatch):
    trainer, inside, fill = tiny.trainer(kind="llama"), [], LogitBuffer.fill

    def look(self, hidden):
        inside.append((trainer.memory_report().by_owner().get("logits"), self.buffer.nbytes))
        return fill(self, hidden)

    monkeypatch.setattr(LogitBuffer, "fill", look)
    trainer.step(*tiny.batch())
    assert inside
    assert all(counted >= taken > 0 for counted, taken in inside)
    assert "logits" not in trainer.memory_report().by_owner()
