"""The list of known bugs stays applicable: each text is where the list says, once."""

from pathlib import Path

import pytest
from mutation_list import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_the_text_of_a_mutation_occurs_once(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert all((ROOT / name).exists() for name in mutation.tests)
