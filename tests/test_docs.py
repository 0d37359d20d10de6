"""What a user reads first runs: the README's blocks; and it names everything that is public."""

import contextlib
import io
import re
from pathlib import Path

import fastppo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), scope)
    before, after = (float(number) for number in printed.getvalue().split("->"))
    assert after > before
    assert "objective/kl" in scope["stats"]


def test_readme_names_every_public_name():
    assert [name for name in fastppo.__all__ if f"`{name}`" not in README] == []


def test_readme_links_exist():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (root / link).exists()] == []
