"""The guide's blocks run, and the measurements that it names exist."""

import contextlib
import io
import re
from pathlib import Path


def test_the_guide_runs_and_names_what_is_measured(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, "guide.md", "exec"), scope)
    measured = set(scope["history"][0]) | set(scope["stats"])
    named = set(re.findall(r"`((?:objective|ppo|tokens|time|env)/[\w/]+)`", page))
    assert len(named) > 10
    assert named - measured == set()
