"""The Triton kernels compiled ahead of time, without a GPU: no spills, within the limits, the instructions meant."""

import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="triton has no wheel for this platform")
# They are not installed, and only `python -m pytest` looks for modules where it is started.
sys.path.insert(0, str(ROOT))

from benchmarks import kernel_report

VARIANTS = [variant.name for variant in kernel_report.variants()]
CAPABILITIES = [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
# Loads and stores of 16 bytes, as the blocks make them: 4096 logits over 256 threads are 2 loads of bf16, 4 of fp32,
# 8 of fp64 a pass and tensor; the gradient reads them once more and stores 2 of bf16.
VECTORS = {
    "row_statistics bf16": (2, 0),
    "row_statistics fp32 softcap": (4, 0),
    "row_statistics fp32 softcap ref": (8, 0),
    "row_statistics fp64 softcap": (8, 0),
    "logit_gradient bf16 in place": (2, 2),
    "logit_gradient fp32 to bf16 all": (8, 2),
    "ppo_rows fp32 to bf16": (8, 2),
    "ppo_rows bf16 in place all": (4, 2),
    "ppo_loss fp32": (5, 2),
    "sample fp32 top-k": (24, 0),
    "sample bf16 top-p": (14, 0),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    try:
        kernel_report.disassembler()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_compiles_without_spills_and_within_the_limits(name, capability):
    found = kernel_report.figures(name, capability)
    assert [found[key] for key in ("stack", "local", "local_load", "local_store")] == [0] * 4, f"spills: {found}"
    assert 0 < found["reg"] <= 255
    assert found["shared"] <= kernel_report.SHARED_LIMIT[capability]
    assert found["instructions"] > 100


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("row_", "logit_", "ppo_rows"))])
def test_two_programs_of_a_row_kernel_fit_on_a_multiprocessor(name, capability):
    if "fp64" not in name:
        assert kernel_report.figures(name, capability)["reg"] <= 128


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", VECTORS)
def test_rows_are_read_and_written_16_bytes_at_a_time(name, capability):
    found = kernel_report.figures(name, capability)
    assert (found["load_128"], found["store_128"]) == VECTORS[name]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["tile_statistics bf16", "tile_statistics bf16 all"])
def test_tiles_of_half_precision_go_to_the_tensor_cores(name, capability):
    found = kernel_report.figures(name, capability)
    assert found["tensor_core"] >= 4
    assert name.endswith("all") or found["async_load_128"] >= 4


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_half_precision_attention_goes_to_the_tensor_cores(capability):
    assert kernel_report.figures("paged_attention bf16", capability)["tensor_core"] >= 4
    assert kernel_report.figures("paged_attention fp32 all", capability)["tensor_core"] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["int8_linear bf16 16 rows in parts", "int8_linear bf16 64 rows"])
def test_codes_become_operands_of_the_tensor_cores(name, capability):
    found = kernel_report.figures(name, capability)
    assert found["tensor_core"] >= 4
    assert found["load_128"] + found["async_load_128"] >= 4


def test_fp32_tiles_keep_their_24_bits():
    """A tensor core would round them to 11 bits."""
    assert kernel_report.figures("tile_statistics fp32 all", 90)["tensor_core"] == 0
