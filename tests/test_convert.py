"""`fastppo convert`: old TRL checkpoints come over bit for bit, and a pickle that carries code is refused."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastppo import AutoModelForCausalLMWithValueHead
from fastppo.cli import main
from fastppo.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, about a name that peft calls


def new_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=32, **sizes)).eval()


def new_head(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "v_head.summary.weight": torch.randn(1, 16).to(dtype),
        "v_head.summary.bias": torch.randn(1).to(dtype),
    }


def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([[1, 2, 3, 4]]))[0]


@pytest.fixture
def full(tmp_path) -> tuple[Path, LlamaForCausalLM, dict[str, torch.Tensor]]:
    """A full model as TRL 0.7 saved it."""
    folder, model, head = tmp_path / "full", new_model(), new_head()
    model.config.save_pretrained(folder)
    torch.save({**model.state_dict(), **head}, folder / "pytorch_model.bin")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_strange.py").write_text("raise SystemExit")
    torch.save({"step": torch.ones(1)}, folder / "optimizer.pt")
    return folder, model, head


@pytest.fixture
def adapter(tmp_path) -> tuple[Path, PeftModel, dict[str, torch.Tensor]]:
    """An adapter as TRL 0.7 saved it: PEFT's files, and the value head alone in a pickle."""
    base = new_model()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder, head = tmp_path / "adapter", new_head()
    model.save_pretrained(folder)
    torch.save(head, folder / "pytorch_model.bin")
    return folder, model.eval(), head


def test_a_full_model_comes_over(full, tmp_path, capsys):
    source, model, head = full
    assert main(["convert", str(source), str(tmp_path / "new")]) == 0
    assert "warning: pytorch_model.bin" in capsys.readouterr().err
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.v_head.summary.weight, head["v_head.summary.weight"])
    assert torch.equal(loaded.v_head.summary.bias, head["v_head.summary.bias"])
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} & files
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= files


@pytest.mark.parametrize("is_pickled", [False, True], ids=["adapter in safetensors", "adapter in a pickle"])
def test_an_adapter_comes_over(adapter, tmp_path, is_pickled):
    source, model, head = adapter
    if is_pickled:
        torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
        (source / "adapter_model.safetensors").unlink()
    convert(source, tmp_path / "new")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.v_head.summary.weight, head["v_head.summary.weight"])
    saved = load_file(tmp_path / "new" / "value_head.safetensors")
    assert sorted(saved) == ["v_head.summary.bias", "v_head.summary.weight"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "new")
    assert torch.equal(logits(plain), logits(model))


def test_shards_come_over(full, tmp_path):
    source, model, head = full
    state = {**model.state_dict(), **head}
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    (source / "pytorch_model.bin").unlink()
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    for shard, part in shards.items():
        torch.save({name: state[name] for name in part}, source / shard)
    (source / "pytorch_model.bin.index.json").write_text(
        str({"metadata": {}, "weight_map": weight_map}).replace("'", '"')
    )
    convert(source, tmp_path / "new")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.v_head.summary.weight, head["v_head.summary.weight"])


def test_a_half_precision_value_head_becomes_fp32(full, tmp_path):
    source, model, _ = full
    head = new_head(torch.bfloat16)
    torch.save({**model.state_dict(), **head}, source / "pytorch_model.bin")
    convert(source, tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved["v_head.summary.weight"].dtype == torch.float32
    assert torch.equal(saved["v_head.summary.weight"], head["v_head.summary.weight"].float())


class Payload:
    """Runs a command when a common reader of pickles meets it."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_in_it_is_refused(adapter, tmp_path, capsys, name, is_zip):
    source, _, head = adapter
    marker = tmp_path / "executed"
    content = {**head, "v_head.extra": Payload(f"touch {marker}")}
    torch.save(content, source / name, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        with zipfile.ZipFile(source / name) as archive:
            program = next(archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
        assert b"system" in program, "the payload is not in the file"
    assert main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert not marker.exists()
    assert not (tmp_path / "new").exists()
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("content", [[torch.ones(1)], {"v_head.summary.weight": 1.0}, {}, {1: torch.ones(1)}])
def test_what_is_no_dictionary_of_tensors_is_refused(adapter, tmp_path, content):
    source, _, _ = adapter
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        convert(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_damaged_files_are_refused(adapter, tmp_path):
    source, _, _ = adapter
    whole = (source / "pytorch_model.bin").read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        (source / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            convert(source, tmp_path / "new")


def test_loading_says_how_to_import(adapter):
    with pytest.raises(ValueError, match="fastppo convert"):
        AutoModelForCausalLMWithValueHead.from_pretrained(adapter[0])


def test_nothing_is_overwritten_or_made_up(adapter, full, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        convert(adapter[0], full[0])
    with pytest.raises(ValueError, match="no pickle to import"):
        convert(tmp_path / "base", tmp_path / "new")
    with pytest.raises(ValueError, match="not a directory"):
        convert(tmp_path / "absent", tmp_path / "new")
