"""Prompts for the command line: every kind of file, and the part of them that is held out."""

import json

import pytest

from fastppo.cli.data import hold_out, read_rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", '[{"text": "x"}, {"text": "y", "n": "1"}]'),
        ("d.jsonl", '{"text": "x"}\n\n{"text": "y", "n": "1"}\n'),
        ("d.csv", "text,n\nx,\ny,1\n"),
    ],
)
def test_files_of_prompts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows = read_rows(str(tmp_path / name))
    assert [row["text"] for row in rows] == ["x", "y"]
    assert rows[0].keys() == rows[1].keys() == {"text", "n"}
    assert rows[1]["n"] == "1"
    assert len(read_rows(str(tmp_path / name), limit=1)) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_line_separators_inside_a_text_do_not_end_it(tmp_path, separator):
    text = f"one{separator}two"
    contents = {
        "d.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
        "d.csv": f'text,n\n{text},1\n"a\nb",2\n',
        "d.txt": text + "\n",
    }
    if separator == "\x0c":  # which JSON wants escaped
        del contents["d.jsonl"]
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows = read_rows(str(tmp_path / name))
        assert rows[0]["text"] == text
        assert [row["text"] for row in rows[1:]] == (["a\nb"] if name == "d.csv" else [])


def test_files_of_prompts_without_columns_or_text(tmp_path):
    from pyarrow import Table, parquet

    (tmp_path / "d.txt").write_text("one\n\ntwo words\n")
    assert read_rows(str(tmp_path / "d.txt")) == [{"text": "one"}, {"text": "two words"}]
    parquet.write_table(Table.from_pylist([{"text": "x", "n": 1}]), tmp_path / "d.parquet")
    assert read_rows(str(tmp_path / "d.parquet")) == [{"text": "x", "n": 1}]
    for name, content in {"e.json": "{", "e.jsonl": "[1]\n", "f.json": '{"a": 1}', "e.txt": "\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_rows(str(tmp_path / name))


def test_held_out_prompts_are_not_trained_on():
    rows = [{"text": str(i % 7), "number": i} for i in range(70)]
    rest, held_out = hold_out(rows, 5, None)
    assert len(held_out) == 5
    assert not {row["text"] for row in rest} & {row["text"] for row in held_out}
    unique = [{"query": str(i)} for i in range(100)]
    rest, held_out = hold_out(unique, 10, "query")
    assert (len(rest), [int(row["query"]) for row in held_out]) == (90, list(range(0, 100, 10)))
    for size in (-1, 100):
        with pytest.raises(ValueError, match="eval_size"):
            hold_out(unique, size, None)
    with pytest.raises(ValueError, match="nothing is left"):
        hold_out([{"text": "same"}] * 4, 2, None)
