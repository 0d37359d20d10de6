"""Training and scoring on packed rows: the same numbers as on padded ones, checkpointing included."""

import pytest
import tiny_trainers as tiny
import torch

from fastppo.models import attach, passes


@pytest.fixture
def packing(monkeypatch):
    """Let models pack where the reference serves attention, too; return the sizes of the rows."""
    monkeypatch.setattr(passes, "has_kernels", lambda device: True)
    rows = []
    forward = attach.packed_hidden
    monkeypatch.setattr(passes, "packed_hidden", lambda model, ids: rows.append(len(ids)) or forward(model, ids))
    return rows


def stepped(kind="llama", adapter=False, checkpointing=None, **settings):
    model = tiny.lora(kind) if adapter else tiny.policy(kind)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    # Not Adam, which would blow up the roundings in gradients that ought to be zero, as those of GPT-2's key biases.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = tiny.trainer(model, others={"optimizer": optimizer}, **settings)
    stats = trainer.step(*tiny.batch())
    return {name: value for name, value in stats.items() if isinstance(value, float)}, tiny.weights(trainer.model)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_step_on_packed_rows_is_that_on_padded_ones(packing, monkeypatch, kind, adapter):
    settings = {"kind": kind, "adapter": adapter, "mini_batch_size": 2, "kl_penalty": "full"}
    packed_stats, packed_weights = stepped(**settings)
    assert max(packing) == 2  # the micro-batch bounds a row, and with it the memory
    packing.clear()
    monkeypatch.setattr(passes, "has_kernels", lambda device: False)
    stats, weights = stepped(**settings)
    assert not packing
    assert tiny.distance(weights, packed_weights) < 1e-4
    for name, value in stats.items():
        if "time" not in name:
            assert packed_stats[name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpointing_recomputes_on_the_packed_layout(packing, how):
    _, plain = stepped()
    _, checkpointed = stepped(checkpointing=how)
    assert tiny.distance(plain, checkpointed) < 1e-5


def test_packed_rows_take_the_samples_as_they_come():
    assert passes.length_groups([5, 9, 1, 4, 2], 2, is_packed=True) == [[0, 1], [2, 3], [4]]


def test_a_pass_has_no_more_tokens_than_are_allowed_unless_one_sample_has():
    lengths = [5, 9, 1, 4, 2, 30]
    assert passes.length_groups(lengths, 8, True, max_tokens=15) == [[0, 1, 2], [3, 4], [5]]
    # Padded to the longest of each: 30, 2 of 9, 4 of 4.
    assert passes.length_groups(lengths, 8, max_tokens=18) == [[5], [1, 0], [3, 4, 2]]


def test_the_model_is_itself_again_after_a_step(packing):
    model = tiny.policy("llama")
    tiny.trainer(model).step(*tiny.batch())
    assert packing
    assert model.config._attn_implementation == "sdpa"
    assert not attach.is_attached(model)


def test_a_model_that_padding_harms_is_not_trained():
    model = tiny.policy("gpt2")
    # A stand-in for a model that looks at what comes later: each hidden state is moved by the last one of the row.
    model.pretrained_model.transformer.ln_f.register_forward_hook(lambda _, __, output: output + output[:, -1:])
    with pytest.raises(NotImplementedError, match="cannot be run on padded batches"):
        tiny.trainer(model).step(*tiny.batch())


def test_a_long_neighbour_does_not_change_a_short_sequence():
    """Dynamic NTK and longrope choose frequencies by the longest sequence of a batch, unless they are pinned."""
    short, long = torch.arange(2, 8), torch.arange(30).repeat(20)[:600]
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    longrope |= {"original_max_position_embeddings": 64, "factor": 8.0, "rope_theta": 1e4}
    for rope in (longrope, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}):
        model = tiny.network("llama", rope_parameters=dict(rope)).eval()
        rotary = model.model.rotary_emb
        before = rotary.inv_freq.clone()
        with torch.no_grad(), attach.attached(model):
            alone = attach.packed_hidden(model, [short])
            beside = attach.packed_hidden(model, [long, short])[len(long) :]
        torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)
        assert rotary.rope_type == rope["rope_type"]
        assert torch.equal(rotary.inv_freq, before)
        with torch.no_grad():  # the case means something: the model by itself is moved by its neighbour
            row = model.model(input_ids=torch.stack([long, long]), use_cache=False)[0][0, :6]
            start = model.model(input_ids=long[None, :6], use_cache=False)[0][0]
        assert float((row - start).abs().max()) > 1e-3
