"""The examples run: each one's `main()`, with settings of a few seconds and no network, and the parts they share."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fastppo import Engine
from fastppo.demo import corpus

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch):
    # They are scripts that import each other by their own names, as Python lets them when one is started.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture
def reviews_file(tmp_path):
    rows = [{"text": row.text, "label": int(row.tone == "warm")} for row in corpus.reviews(120, 0)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_examples_are_short():
    sources = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    lengths = {name: len(source.splitlines()) for name, source in sources.items() if "def main(" in source}
    assert len(lengths) >= 4
    assert not {name: length for name, length in lengths.items() if length > 80}


def test_sentiment(shared_path, tmp_path):
    from sentiment import main

    model = shared_path("models/stories260k")
    few = {"max_steps": 2, "batch_size": 8, "num_prompts": 16, "held_out": 16, "prompt_tokens": 6, "max_new_tokens": 6}
    summary = main(flags(model_name_or_path=model, output_dir=tmp_path / "run", **few))
    assert summary["steps"] == 2
    assert -1 <= summary["reward_after"] <= 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 10_000
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"Once upon a time there was {i}"}) + "\n" for i in range(60)))
    summary = main(flags(model_name_or_path=model, dataset_name=prompts, output_dir=tmp_path / "other", **few))
    assert summary["steps"] == 2


FEW = {"max_steps": 2, "batch_size": 8, "max_new_tokens": 6, "held_out": 12}


@pytest.fixture(scope="module")
def film_run(tmp_path_factory):
    """The summary of a run of examples/film_reviews.py, and its folder, whose small models serve other tests."""
    folder = tmp_path_factory.mktemp("film")
    rows = [{"text": row.text, "label": int(row.tone == "warm")} for row in corpus.reviews(120, 0)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from film_reviews import main

        few = FEW | {"epochs": 1, "passes": 1, "vocabulary": 300}
        return main(flags(data=folder / "reviews.jsonl", output_dir=folder / "run", **few)), folder


def test_film_reviews(film_run):
    summary, folder = film_run
    assert summary["steps"] == 2
    assert 0 <= summary["reward_before"] <= 1
    assert summary["kl_before"] == pytest.approx(0, abs=1e-4)
    # A model of one epoch is nearly as unsure as its 300 tokens allow.
    assert 20 < summary["perplexity_before"] < 400
    assert json.loads((folder / "run" / "summary.json").read_text()) == summary
    assert not list((folder / "run").rglob("*.bin")), "a pickle was written"


@pytest.fixture
def small_models(film_run):
    """Flags that name the small models and the data of the film reviews."""
    run = film_run[1] / "run"
    names = {"model_name_or_path": run / "language_model", "reward_model": run / "classifier"}
    return names | {"dataset_name": film_run[1] / "reviews.jsonl"}


def test_sentiment_with_a_classifier_and_an_adapter_on_8_bits(small_models, tmp_path):
    from sentiment_adapters import main

    few = FEW | {"num_prompts": 24, "prompt_tokens": 5, "output_dir": tmp_path}
    assert main(flags(**small_models, **few))["steps"] == 2
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["r"] == 8


def test_sentiment_on_demand(small_models, tmp_path):
    from sentiment_control import main, wished

    assert wished(torch.tensor([2.0, -1.0, 3.0]), ["positive", "neutral", "negative"]) == [2.0, 2.0, -3.0]
    few = FEW | {"num_prompts": 24, "output_dir": tmp_path}
    assert main(flags(**small_models, **few))["steps"] == 2
    samples = [json.loads(line) for line in (tmp_path / "held_out_after.jsonl").read_text().splitlines()]
    assert [row["query"].split("]")[0] for row in samples[:4]] == ["[positive", "[neutral", "[negative", "[positive"]


@pytest.mark.parametrize("how", [{"num_shared_layers": 1}, {"lora_rank": 2}])
def test_toxicity_on_a_small_gpt_j(how, small_models, tmp_path):
    from toxicity import main
    from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small_models["model_name_or_path"])
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    given = small_models | {"model_name_or_path": tmp_path / "gptj", "output_dir": tmp_path / "run"}
    few = FEW | {"mini_batch_size": 4, "prompt_tokens": 6, "num_prompts": 32}
    assert main(flags(**given, **few, **how))["steps"] == 2


def test_best_of_n_is_never_worse_than_fewer(small_models):
    from best_of_n import main

    means = main(flags(**small_models, num_prompts=6, max_new_tokens=6, sample_sizes="1,4"))
    assert means.keys() == {"best_of_1", "best_of_4"}
    assert means["best_of_4"] > means["best_of_1"]


def test_ways_are_compared(film_run, tmp_path):
    from compare import main

    few = FEW | {"num_prompts": 8, "run": film_run[1] / "run", "data": film_run[1] / "reviews.jsonl"}
    table = main(flags(**few, output_dir=tmp_path))
    assert [row["who"] for row in table][-3:] == ["SFT on praise", "SFT on best of 8", "PPO"]
    plain, of_4, of_16 = (row["reward"] for row in table[:3])
    assert plain < of_4 < of_16
    assert table[0]["gain_per_s"] == 0 < table[1]["gain_per_s"]
    assert json.loads((tmp_path / "compare.json").read_text()) == table


@pytest.mark.parametrize("task", ["translation", "summary"])
def test_seq2seq_on_a_task_made_by_rule(task, tmp_path):
    from seq2seq import main

    few = FEW | {"num_rows": 60, "supervised_steps": 2, "output_dir": tmp_path}
    summary = main(flags(task=task, **few))
    assert summary["steps"] == 2
    assert -1 <= summary["reward_after"] <= 1


def test_stack_llama_on_a_small_llama(small_models, tmp_path):
    from stack_llama import main

    drawn = corpus.preference_pairs(40, 0)
    names = {"response_j": "chosen", "response_k": "rejected"}
    rows = [
        {"question": f"Is film {i} good?"} | {new: pair[old] for new, old in names.items()}
        for i, pair in enumerate(drawn)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {
        "model_name_or_path": small_models["model_name_or_path"],
        "dataset_name": data,
        "output_dir": tmp_path / "run",
    }
    assert main(flags(**given, **FEW, max_length=90))["steps"] == 2
    for adapter, kind in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS"), (".", "CAUSAL_LM")):
        saved = json.loads((tmp_path / "run" / adapter / "adapter_config.json").read_text())
        assert (saved["task_type"], saved["r"]) == (kind, 16)


def test_reviews_are_found_or_made(tmp_path, reviews_file, monkeypatch, capsys):
    from film_data import find_reviews

    assert len(find_reviews(str(reviews_file), 0)) == 120
    monkeypatch.setenv("FASTPPO_SHARED", str(tmp_path))
    made = find_reviews(None, 0, count=50)
    assert "grammar" in capsys.readouterr().out
    assert {row["label"] for row in made} == {0, 1}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "movie_reviews.jsonl").write_text('{"text": "a\\u2028b", "label": 1}\n')
    assert find_reviews(None, 0) == [{"text": "a\u2028b", "label": 1}]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_reviews("nowhere.jsonl", 0)


def test_no_review_is_in_two_parts():
    from film_data import divide

    rows = [{"text": str(i), "label": i % 2} for i in range(1001)]
    parts = divide(rows, seed=3)
    texts = [row["text"] for part in (parts.first, parts.second, parts.held_out) for row in part]
    assert len(texts) == len(set(texts)) == 1001
    assert (len(parts.held_out), len(parts.first), len(parts.second)) == (200, 400, 401)
    assert divide(rows, seed=3) == parts != divide(rows, seed=4)


def test_openings_are_different_and_unfinished():
    from film_data import openings

    rows = [{"text": text} for text in ("a b c d", "a b c e f", "a b c", "x y z w")]
    assert openings(rows) == ["a b c", "x y z"]


def test_judge_by_hand():
    from film_data import WordJudge

    judge = WordJudge([{"text": "good good film", "label": 1}, {"text": "bad film", "label": 0}])
    # Praise has good, film, "good good", "good film"; blame has bad, film, "bad film"; six are known.
    assert judge.weights["good"] == pytest.approx(math.log((2 / 10) / (1 / 9)))
    assert judge.weights["film"] == pytest.approx(math.log((2 / 10) / (2 / 9)))
    assert judge.weights["bad", "film"] == pytest.approx(math.log((1 / 10) / (2 / 9)))
    assert judge(["good acting", "bad acting", "acting"]) == [1.0, 0.0, 0.0]
    assert judge.accuracy([{"text": "good", "label": 1}, {"text": "bad", "label": 1}]) == 0.5


def test_variety_adds_up_to_the_distinct_pairs():
    from recipes import variety

    texts = ["a b c", "a b", "", "one"]
    # "a b" is in two texts and counts half in each, "b c" is in one.
    assert variety(texts) == [0.75, 0.5, 0.0, 0.0]


def test_perplexity_is_that_of_plain_transformers():
    from recipes import perplexity

    model, prompts, completions = tiny.llama(), [[5, 6, 7], [9]], [[8, 2], [4, 4, 11]]
    logprobs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        rows = model(ids).logits[0].double().log_softmax(-1)
        logprobs += [rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
    expected = math.exp(-sum(logprobs) / 5)
    assert perplexity(Engine(model), prompts, completions) == pytest.approx(expected, rel=1e-5)


def test_flags_have_the_types_of_their_defaults():
    from recipes import read_flags

    read = read_flags("What it does.", ["--rate=1e-3", "--steps=4", "--data=x"], rate=0.5, steps=2, data=None, name="n")
    assert vars(read) == {"rate": 1e-3, "steps": 4, "data": "x", "name": "n"}
    with pytest.raises(SystemExit):
        read_flags("What it does.", ["--steps=many"], steps=2)


def test_noise_changes_what_it_says_and_no_more():
    from measures import with_typos, without_a_word

    draw = random.Random(0)
    for _ in range(20):
        spoilt = with_typos("an unlikely film is", draw).split()
        changed = [new for new, old in zip(spoilt, ["an", "unlikely", "film", "is"], strict=True) if new != old]
        assert len(changed) <= 1  # two equal neighbours may be exchanged
        assert sorted("".join(spoilt)) == sorted("anunlikelyfilmis")
    assert with_typos("a b", draw) == "a b"
    assert without_a_word("one", draw) == "one"
    assert {without_a_word("one two", draw) for _ in range(20)} == {"one", "two"}


def test_novelty_by_hand():
    from measures import novelty

    # Of "a b c d", "b c d e" and once more "a b c d", the first and the last are known.
    assert novelty(["a b c d e", "a b c d", "x y"], ["z a b c d"]) == pytest.approx(1 / 3)
