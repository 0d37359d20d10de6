"""docs/models.md says what the probe says."""

from pathlib import Path

import families
import pytest
import transformers

TABLE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


def entries(family):
    lines = [line for line in TABLE.splitlines() if line.startswith(f"| {family} |")]
    assert len(lines) == 1, f"{family} has {len(lines)} rows"
    return [entry.strip() for entry in lines[0].split("|")[2:-1]]


@pytest.mark.parametrize(
    "family", [f if f in families.FAST else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES]
)
def test_the_table_is_what_the_probe_finds(family):
    if transformers.__version__ not in TABLE:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    tier, training, _ = families.row(family)  # of the difference only the tier's bound is portable
    assert entries(family)[:2] == [tier, training]


@pytest.mark.parametrize(
    "family",
    [f if f in families.FAST_SEQ2SEQ else pytest.param(f, marks=pytest.mark.slow) for f in families.SEQ2SEQ],
)
def test_the_table_of_encoder_decoders_is_what_the_probe_finds(family):
    if transformers.__version__ not in TABLE:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    tier, training, _ = families.row(family, with_encoder=True)
    assert entries(f"{family}, with its encoder")[:2] == [tier, training]


def test_the_table_has_every_family():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(families.FAMILIES) + len(families.SEQ2SEQ) >= 50
