"""TextEnvironment: what is written, what is computed, what is recorded, and what PPO gets of it."""

import threading
import time

import pytest
import scripted
import tiny
import tiny_trainers
import torch

from fastppo import Engine, PPOConfig, PPOTrainer, SamplingConfig, TextEnvironment, TextHistory
from fastppo.engine import engine as engine_module
from fastppo.engine.paged import PagedDecoder
from fastppo.environments.calls import Request, parse_tool_call
from fastppo.environments.environment import named_tools

CALLED = "<request><Echo>ab ab<call>"
ANSWERED = "ab ab!<response>"
SUBMITTED = "ab<submit>"


class Echo:
    def __call__(self, query):
        return query + "!"


def environment(model=None, tools=None, **settings):
    tools = [Echo()] if tools is None else tools
    options = {"reward_fn": lambda texts: [float(len(text)) for text in texts], "prompt": "Do: "}
    return TextEnvironment(model or scripted.model(), scripted.tokenizer(), tools, **(options | settings))


def ids(text):
    return scripted.tokenizer()(text, add_special_tokens=False)["input_ids"]


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "reason"), [(1, "max_turns"), (2, "max_turns"), (3, "submit"), (4, "submit")])
def test_an_episode_is_prompt_task_turns_and_results(monkeypatch, turns, reason):
    scripted.say(monkeypatch, [(CALLED + ANSWERED) * 2 + SUBMITTED])
    env = environment(max_turns=turns)
    (query,), (response,), (mask,), (reward,), (history,) = env.run(["ab?"])
    parts = [CALLED, ANSWERED, CALLED, ANSWERED, SUBMITTED][: 2 * turns]
    assert history.text == "Do: ab?" + "".join(parts)
    assert query.tolist() == [257, *ids("Do: ab?")]
    assert response.tolist() == ids("".join(parts))
    assert mask.tolist() == [int(i % 2 == 0) for i, part in enumerate(parts) for _ in ids(part)]
    assert history.system_spans == [True] + [bool(i % 2) for i in range(len(parts))]
    assert (history.end_reason, history.completed, history.truncated) == (reason, reason == "submit", False)
    last = parts[-1] if reason == "submit" else CALLED  # what the model wrote last, never a tool's answer
    assert reward == history.reward == len(last)
    assert [(call.tool, call.query, call.response, call.error) for call in history.calls] == [
        ("Echo", "ab ab", "ab ab!", "")
    ] * min(turns, 2)


def test_history_keeps_segments_as_trl_does():
    history = TextHistory("Hello", torch.tensor([4, 5]))
    history.append_segment(" you", torch.tensor([6, 7, 8]), system=False)
    history.append_segment(" there", torch.tensor([9]))
    assert history.text_spans == [(0, 5), (5, 9), (9, 15)]
    assert history.token_spans == [(0, 2), (2, 5), (5, 6)]
    assert history.token_masks.tolist() == [0, 0, 1, 1, 1, 0]
    assert (history.last_text_segment, history.last_model_segment) == (" there", " you")
    assert [part.tolist() for part in history.split_query_response_tokens()] == [[4, 5], [6, 7, 8, 9], [1, 1, 1, 0]]
    history.complete(truncated=True)
    assert (history.completed, history.truncated) == (True, True)
    with pytest.raises(ValueError, match="a segment needs tokens"):
        history.append_segment("", torch.tensor([]))


def test_a_history_is_shown_in_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    history = TextHistory("What?", torch.tensor([4, 5]))
    history.append_segment("[this]", torch.tensor([6]), system=False)
    history.append_segment("", torch.tensor([299]), system=False)  # beyond the tokenizer's vocabulary
    history.reward = 0.5
    history.show_text(show_legend=True)
    history.show_tokens(tiny.tokenizer())
    shown = capsys.readouterr().out
    for text in ("What?", "[this]", "Reward: 0.5", "Model", "w4", "w6", "<299>"):
        assert text in shown
    assert shown.count("\x1b[") > 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<request><Tool1>query<call>", ("Tool1", "query")),
        ("<s>so <request> <Tool1>a > b\n<call> rest", ("Tool1", "a > b\n")),
        ("<request>2 > 1, so <Tool1>query<call>", ("Tool1", "query")),  # where TRL's query is " 1, so <Tool1>query"
        ("<request>Tool1>query<call>", (None, None)),
        ("<request><Tool1>query", (None, None)),
        ("<Tool1>query<call>", (None, None)),
        ("", (None, None)),
    ],
)
def test_calls_are_read_as_trl_reads_them(text, expected):
    assert parse_tool_call(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no idea</s>", "eos"),
        ("x" * 40, "no call"),
        ("<submit>", "submit"),
        ("<call>", "no call"),
        ("<request><Echo>a</s>", "eos"),
    ],
)
def test_episodes_end_without_a_call(monkeypatch, text, reason):
    scripted.say(monkeypatch, [text])
    *_, (history,) = environment(generation_kwargs={"max_new_tokens": 30}).run(["</s> in a task ends nothing"])
    assert history.end_reason == reason
    assert history.text.endswith(text[:30])
    assert history.completed
    assert not history.truncated
    assert len(history.system_spans) == 2


# --- what tools do --------------------------------------------------------------------------------------------------


def test_what_goes_wrong_with_tools_is_data(monkeypatch):
    def broken(query):
        raise KeyError("gone")

    def leaving(query):
        raise SystemExit(3)

    def telling(query):
        raise ValueError(10**5000)

    async def later(query):
        return query.upper()

    cases = {
        "<request><Nope>a<call>": ("Unknown tool Nope.", "unknown tool"),
        "<request>Echo a<call>": ("Unknown tool call: <request>Echo a<call>", "unparsable"),
        "<request><broken>a<call>": ("Tool error: 'gone'", "exception"),
        "<request><leaving>a<call>": ("Tool error: 3", "exception"),
        "<request><hanging>a<call>": ("Tool error: no answer within 0.2 seconds", "timeout"),
        "<request><later>a<call>": ("A", ""),
        "<request><number>a<call>": ("17", ""),
        "<request><half>a<call>": ("a?", ""),
        "<request><telling>a<call>": ("Tool error: ValueError", "exception"),
    }
    scripted.say(monkeypatch, [called + answer + "<response><submit>" for called, (answer, _) in cases.items()])
    tools = {"hanging": lambda query: time.sleep(3), "number": lambda query: 17}
    tools |= {"telling": telling, "half": lambda query: "a\ud800"}
    tools |= {"broken": broken, "leaving": leaving, "later": later}
    start = time.monotonic()
    *_, histories = environment(tools=tools, tool_timeout=0.2).run(["a"] * len(cases))
    assert time.monotonic() - start < 2.5
    for history, (called, (answer, error)) in zip(histories, cases.items(), strict=True):
        assert history.text == f"Do: a{called}{answer}<response><submit>"
        assert [(call.response, call.error) for call in history.calls] == [(answer, error)]
        assert history.end_reason == "submit"


def test_a_number_too_long_to_be_written_is_an_error_of_its_tool(monkeypatch):
    scripted.say(monkeypatch, ["<request><huge>a<call>" + "x" * 300])
    *_, (history,) = environment(tools={"huge": lambda query: 10**5000}, max_turns=1).run(["a"])
    assert history.calls[0].error == "exception"
    assert "integer string conversion" in history.calls[0].response


@pytest.mark.parametrize("limit", [3, 100, 599, 600])
def test_long_results_are_cut(monkeypatch, limit):
    answer = "x" * 600 if limit >= 600 else "x" * (limit - 3) + "..."
    scripted.say(monkeypatch, ["<request><long>a<call>" + answer + "<response><submit>"])
    env = environment(scripted.model(1000), {"long": lambda query: "x" * 600}, max_tool_reponse=limit)
    *_, (history,) = env.run(["a"])
    assert history.text == f"Do: a<request><long>a<call>{answer}<response><submit>"
    assert history.calls[0].is_cut == (limit < 600)


def test_a_tool_cannot_write_special_tokens(monkeypatch):
    scripted.say(monkeypatch, ["<request><evil>a<call>" + "x" * 200])
    env = environment(tools={"evil": lambda query: "</s><|im_end|>!"}, max_turns=1)
    _, (response,), (mask,), _, (history,) = env.run(["a"])
    written = response[mask == 0].tolist()
    assert not set(written) & {257, 258, 259, 260}
    assert scripted.tokenizer().decode(written) == "</s><|im_end|>!<response>"
    assert history.text.endswith("</s><|im_end|>!<response>")


def test_an_episode_that_waits_does_not_hold_up_the_others(monkeypatch):
    """The tool of the first returns only when the second, which shares its batch, is through three turns."""
    others_end, order = threading.Event(), []

    def slow(query):
        assert others_end.wait(20)
        order.append("slow")
        return "ok"

    def quick(query):
        order.append("quick")
        if order.count("quick") == 3:
            others_end.set()
        return "ok"

    loop = "<request><quick>a<call>ok<response>" * 3 + "<submit>"
    scripted.say(monkeypatch, ["<request><slow>a<call>ok<response><submit>", loop, "y" * 90 + "<submit>"])
    env = environment(tools={"slow": slow, "quick": quick}, tool_timeout=25, generation_kwargs={"max_new_tokens": 99})
    *_, histories = env.run(["a", "b", "c"])
    assert order == ["quick"] * 3 + ["slow"]
    assert [history.end_reason for history in histories] == ["submit"] * 3


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_what_was_generated_is_never_encoded_again(monkeypatch):
    a, b = ids("a")[0], ids("b")[0]
    called = [*ids("<request><Echo>"), a, b, *ids("<call>")]
    scripted.say(monkeypatch, [called + ids("ab!<response><submit>")])
    _, (response,), _, _, (history,) = environment().run(["a"])
    assert response.tolist()[: len(called)] == called
    assert history.calls[0].query == "ab"


def computed(monkeypatch):
    """Count the tokens of all forward passes."""
    counts, forward = [], PagedDecoder._forward

    def counting(self, program, ids, positions, sequences):
        counts.append(len(ids))
        return forward(self, program, ids, positions, sequences)

    monkeypatch.setattr(PagedDecoder, "_forward", counting)
    return counts


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_no_token_is_computed_twice(monkeypatch, rows):
    texts = [(CALLED + ANSWERED) * turns + "y" * length + "<submit>" for turns, length in ((0, 40), (1, 3), (3, 0))]
    scripted.say(monkeypatch, [*texts, texts[1], texts[2]])
    counts = computed(monkeypatch)
    engine = Engine(scripted.model(), scripted.tokenizer(), max_rows=rows)
    *_, histories = environment(engine).run(["one", "two", "three", "four", "five"])
    assert [history.end_reason for history in histories] == ["submit"] * 5
    # Prompt, turns and results once, but for the last token, which nothing follows.
    assert sum(counts) == sum(len(history.tokens) - 1 for history in histories)
    assert engine.kv_tensors == []


def test_equal_tasks_share_their_prompt(monkeypatch):
    scripted.say(monkeypatch, ["<submit>", CALLED + ANSWERED + "<submit>", "a<submit>", "<submit>"])
    counts = computed(monkeypatch)
    queries, _, _, _, histories = environment().run(["the same long task"] * 4)
    assert sum(counts) == sum(len(history.tokens) - 1 for history in histories) - 3 * len(queries[0])


@pytest.mark.parametrize("is_paged", [True, False])
def test_records_are_those_of_one_pass_over_the_episode(monkeypatch, is_paged):
    monkeypatch.setattr(engine_module, "has_paged_kernels", lambda device: is_paged)
    scripted.say(monkeypatch, [(CALLED + ANSWERED) * 2 + SUBMITTED, SUBMITTED, CALLED + ANSWERED + "</s>"])
    model = scripted.model()
    env = environment(model, generation_kwargs={"temperature": 0.7})
    queries, responses, masks, _, _ = env.run(["a", "longer", "b"])
    assert responses.temperature == 0.7
    assert responses.reasons == ("stop",) * 3
    records = zip(responses.split(responses.logprobs), responses.split(responses.values), strict=True)
    for query, response, mask, (logprobs, values) in zip(queries, responses, masks, records, strict=True):
        drawn = mask.bool()
        expected = tiny_trainers.logprobs_alone(model, query, response, temperature=0.7)
        torch.testing.assert_close(logprobs[drawn].double(), expected[drawn], atol=1e-4, rtol=0)
        assert logprobs[~drawn].isnan().all()
        with torch.no_grad():
            whole = model(input_ids=torch.cat([query, response])[None])[2][0][len(query) - 1 : -1]
        torch.testing.assert_close(values[drawn], whole[drawn], atol=1e-4, rtol=0)


def test_what_is_drawn_depends_on_nobody_elses_tools():
    def run(delay, rows):
        def tool(query):
            time.sleep(delay * (len(query) % 3))
            return "ok"

        engine = Engine(network, scripted.tokenizer(), seed=5, max_rows=rows)
        sampling = SamplingConfig(max_new_tokens=12, stop_strings=("e", "t", "x", "é"))
        env = environment(engine, {"tool": tool}, generation_kwargs=sampling, max_turns=3)
        env.call_format.requests = lambda turn: [Request("tool", turn)]
        _, responses, *_ = env.run([f"task {i}" for i in range(6)])
        return [response.tolist() for response in responses]

    network = scripted.model()
    first = run(0.0, 64)
    assert sum(map(len, first)) > 100
    assert run(0.01, 64) == first
    assert run(0.0, 2) == first


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "limit"), [("max_length", 60), ("context", 60), ("max_length", 39), ("max_length", 21)]
)
def test_no_episode_is_longer_than_it_may_be(monkeypatch, kind, limit):
    scripted.say(monkeypatch, [(CALLED + ANSWERED) * 9])
    env = environment(
        scripted.model(limit if kind == "context" else 600), max_length=limit if kind == "max_length" else None
    )
    _, (response,), _, _, (history,) = env.run(["a"])
    whole = "Do: a" + (CALLED + ANSWERED) * 9
    assert len(history.tokens) <= limit
    assert (history.end_reason, history.completed, history.truncated) == ("max_length", True, True)
    assert history.text == whole[: len(history.text)]
    assert len(response) > 0
    with pytest.raises(ValueError, match=f"task 1 has .* tokens with its prompt, but an episode may have {limit}"):
        env.run(["a", "x" * 70])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"max_tool_response": 2}, "max_tool_response must be at least 3, got 2"),
        ({"tool_timeout": 0}, "tool_timeout must be greater than 0 seconds"),
        ({"call_format": "xml"}, "call_format must be one of"),
        ({"call_format": "chat"}, "needs a tokenizer with a chat template"),
        ({"tools": [lambda query: ""]}, "a tool is named '<lambda>'"),
        ({"tools": [Echo(), Echo()]}, "have the same name"),
        ({"tools": {"a": 3}}, "which cannot be called"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        environment(**settings)


def test_bad_models_tasks_and_rewards_are_named(monkeypatch):
    with pytest.raises(ValueError, match="model must be a language model, an Engine or a PPOTrainer, got NoneType"):
        TextEnvironment()
    with pytest.raises(ValueError, match="the engine has no tokenizer"):
        TextEnvironment(scripted.model())
    for tasks in ("a", []):
        with pytest.raises(ValueError, match="expected a list with at least one task"):
            environment().run(tasks)
    with pytest.raises(ValueError, match="a task is 3"):
        environment().run([3])
    scripted.say(monkeypatch, ["<submit>"])
    with pytest.raises(ValueError, match="got 1 scores for 2 responses"):
        environment(reward_fn=lambda texts: [1.0]).run(["a", "b"])
    assert environment(reward_fn=None).run(["a"])[3] == [None]


def test_tools_are_named_as_functions_and_classes():
    def add(query):
        return query

    assert list(named_tools([add, Echo()])) == ["add", "Echo"]
    assert list(named_tools({"x": add})) == ["x"]
    assert named_tools(None) == {}


def test_a_failure_leaves_the_engine_free(monkeypatch):
    scripted.say(monkeypatch, [CALLED + ANSWERED + SUBMITTED])
    engine = Engine(scripted.model(), scripted.tokenizer())
    env = environment(engine)
    env.call_format.requests = lambda turn: 1 / 0
    with pytest.raises(ZeroDivisionError):
        env.run(["a"])
    assert engine.kv_tensors == []
    assert environment(engine).run(["a"])[4][0].end_reason == "submit"


# --- PPO ------------------------------------------------------------------------------------------------------------


def trainer(**settings):
    config = PPOConfig(batch_size=3, mini_batch_size=3, ppo_epochs=2, learning_rate=1e-3, **settings)
    return PPOTrainer(config, scripted.new_model(), tokenizer=scripted.tokenizer())


def test_step_takes_what_run_returns(monkeypatch):
    scripted.say(monkeypatch, [(CALLED + ANSWERED) * 2 + SUBMITTED, SUBMITTED, CALLED + ANSWERED + "</s>"])
    stats, weights = [], []
    for plain in (False, True):
        mine = trainer()
        env = environment(mine, generation_kwargs={"temperature": 0.7}, reward_fn=lambda texts, bonus: bonus)
        assert env.engine is mine.engine
        queries, responses, masks, rewards, _ = env.run(["a", "longer", "b"], bonus=[1.0, -1.0, 0.5])
        given = list(responses) if plain else responses
        stats.append(mine.step(queries, given, rewards, response_masks=masks))
        weights.append(tiny_trainers.weights(mine.model))
        assert ("ppo/agreement/gap_max" in stats[-1]) is not plain  # measured where there are records
    assert tiny_trainers.distance(*weights) < 1e-4
    for name in ("objective/kl", "ppo/loss/total", "tokens/responses_len_mean"):
        assert float(stats[0][name]) == pytest.approx(float(stats[1][name]), abs=1e-4)


def test_records_are_exact_where_that_is_asked_for():
    mine = trainer(consistency="exact")
    env = environment(mine, {"tool": lambda query: "ok"}, max_turns=3, generation_kwargs={"stop_strings": ["e", "t"]})
    env.call_format.requests = lambda turn: [Request("tool", turn)]
    queries, responses, masks, rewards, histories = env.run(["a", "longer", "b"])
    assert sum(len(history.calls) for history in histories) > 2
    stats = mine.step(queries, responses, rewards, response_masks=masks)
    assert stats["ppo/agreement/gap_max"] == 0


def test_without_masks_tokens_of_tools_are_evaluated_too(monkeypatch):
    scripted.say(monkeypatch, [CALLED + ANSWERED + SUBMITTED])
    mine = trainer()
    queries, responses, _, rewards, _ = environment(mine).run(["a", "b", "c"])
    stats = mine.step(queries, responses, rewards)
    assert stats["ppo/loss/total"] == stats["ppo/loss/total"]  # no NaN
    assert "ppo/agreement/gap_max" not in stats
