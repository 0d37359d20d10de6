"""The list of known bugs stays applicable: each text is where the list says, once."""

import ast
from pathlib import Path

import pytest
from mutation_list import MUTATIONS
from mutations import PARTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_the_text_of_a_mutation_occurs_once(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert all((ROOT / name).exists() for name in mutation.tests)


@pytest.mark.parametrize("name", sorted({name for mutation in MUTATIONS for name in mutation.tests}))
def test_a_copy_of_the_checkout_holds_what_the_tests_import(name):
    found = ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    modules = {node.module.split(".")[0] for node in found if isinstance(node, ast.ImportFrom) and node.module}
    assert {part for part in modules if (ROOT / part).is_dir()} <= set(PARTS)
