"""Rewards from a server: what is sent, each way in which it fails, retries, late answers, and what is kept secret."""

import math
import re
import socket
import threading
import time

import numpy as np
import pytest
import reward_servers as servers
from reward_servers import server

from fastppo.rewards import Reward, RewardServerError, URLReward

PROMPTS, COMPLETIONS = ["a", "b", "c"], ["1", "22", "333"]
CHAT = [{"role": "user", "content": "hé"}]


def make(served, path="", **settings):
    return URLReward(served.url + path, **{"timeout": 5, "backoff": 0.01, "retries": 1} | settings)


def test_prompts_completions_and_columns_are_posted_as_json():
    with server() as served:
        reward = Reward(make(served, "/score?model=x", batch_size=2))
        columns = {"label": [1, 2.5, None], "prompt_ids": [[1]] * 3, "completion_ids": [[2]] * 3}
        assert reward(["a", CHAT, "c"], ["1", "é" * 2, "333"], columns).tolist() == [1.0, 2.0, 3.0]
        both = {"prompts": ["a", CHAT], "completions": ["1", "éé"], "columns": {"label": [1, 2.5]}}
        last = {"prompts": ["c"], "completions": ["333"], "columns": {"label": [None]}}
        assert sorted(served.requests, key=lambda request: request["prompts"][0] == "c") == [both, last]
        assert set(served.paths) == {"/score?model=x"}
        assert served.headers[0]["Content-Type"] == "application/json"
        for value in (np.float32(1.0), math.nan):
            with pytest.raises(ValueError, match=r"cannot send the data's columns \['label'\] as JSON"):
                reward(["a"], ["1"], {"label": [value]})


def test_null_and_nan_are_no_scores():
    with server(b'{"scores": [null, NaN, 3]}') as served:
        got = make(served)(PROMPTS, COMPLETIONS)
        assert got.isnan().tolist() == [True, True, False]


BROKEN = {
    "redirect": (servers.redirects, r"redirects \(status 307\), which is not followed; give the final URL", 1),
    "not found": (404, r"answered with status 404: '<html>no</html>'", 1),
    "unauthorised": (401, "answered with status 401", 1),
    "no JSON": (b"<html>busy</html>", "did not answer in JSON: '<html>busy</html>'; expected .* 3 numbers or nulls", 1),
    "no bytes": (b"", "did not answer in JSON; expected", 1),
    "another schema": (b'{"rewards": [1, 2, 3]}', r"answered: '\{\"rewards\": \[1, 2, 3\]\}'; expected", 1),
    "a bare list": (b"[1, 2, 3]", r"answered: '\[1, 2, 3\]'; expected", 1),
    "too few": (b'{"scores": [1, 2]}', "got 2 scores for 3 responses", 1),
    "texts": (b'{"scores": ["1", 2, 3]}', "score 0 is '1' of type str", 1),
    "infinite": (b'{"scores": [1, Infinity, 3]}', "score 1 is inf", 1),
    "beyond fp64": (b'{"scores": [1, 2, -1e999]}', "score 2 is -inf", 1),
    "error": (500, r"answered with status 500: '<html>no</html>' \(2 tries\)", 2),
    "overloaded": (503, r"answered with status 503.*\(2 tries\)", 2),
    "hangs up": (servers.hangs_up, r"cannot be reached: \w+; is it running\? \(2 tries\)", 2),
    "answers in part": (servers.promises_more, r"cannot be reached: IncompleteRead; is it running\? \(2 tries\)", 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_server_is_an_error_with_a_reason(name):
    answer, message, tries = BROKEN[name]
    with server(otherwise=answer) as served:
        with pytest.raises(RewardServerError, match=message):
            make(served)(PROMPTS, COMPLETIONS)
        assert len(served.requests) == tries


@pytest.mark.parametrize("answer", [500, 502, 429, servers.hangs_up, servers.promises_more, servers.stalls(1)])
def test_what_is_transient_is_tried_again(answer):
    timeout = 5 if isinstance(answer, int) or hasattr(answer, "writes") else 0.3
    with server(answer, answer) as served:
        assert make(served, retries=2, timeout=timeout)(PROMPTS, COMPLETIONS).tolist() == [1.0, 2.0, 3.0]
        assert len(served.requests) == 3


def test_pauses_double_and_a_server_may_ask_for_longer_ones(monkeypatch):
    pauses = []
    monkeypatch.setattr("fastppo.rewards.url.time.sleep", pauses.append)
    with server(500, 500, 500, 500) as served:
        make(served, backoff=1.0, retries=4, timeout=30)(PROMPTS, COMPLETIONS)
    assert all(low <= pause <= 3 * low for pause, low in zip(pauses, (0.5, 1.0, 2.0, 4.0), strict=True))
    pauses.clear()
    with server(*map(servers.busy, ("7", "9999", "Wed, 21 Oct 2026 07:28:00 GMT", "nan"))) as served:
        make(served, backoff=0.0, retries=4, timeout=30)(PROMPTS, COMPLETIONS)
    assert pauses == [7.0, 30.0, 0.0, 0.0]


def test_a_server_that_is_not_there_is_an_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(RewardServerError, match=rf"127.0.0.1:{port}\) cannot be reached: ConnectionRefusedError"):
        URLReward(f"http://127.0.0.1:{port}/x", backoff=0.01, retries=2)(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("answer", [servers.stalls(1.0), servers.drips])
def test_a_late_answer_is_no_score_and_no_zero(answer):
    problems = []
    with server(otherwise=answer) as served:
        reward = Reward(make(served, timeout=0.15, batch_size=2, on_error=5.0), on_problem=problems.append)
        start = time.monotonic()
        assert reward(PROMPTS, COMPLETIONS, {}).isnan().all()
        assert time.monotonic() - start < 2.5
    assert sorted((p.kind, p.rows) for p in problems) == [("timeout", (0, 1)), ("timeout", (2,))]
    assert "did not answer within 0.15 seconds (2 tries)" in problems[0].text


def test_errors_follow_the_policy():
    for on_error, expected in (("drop", math.nan), (-1.0, -1.0)):
        with server(404) as served:
            got = Reward(make(served, batch_size=1, concurrency=1, on_error=on_error))(PROMPTS, COMPLETIONS, {})
            np.testing.assert_array_equal(got, [expected, 2.0, 3.0])
    with server(404) as served, pytest.raises(RewardServerError):
        Reward(make(served, batch_size=1))(PROMPTS, COMPLETIONS, {})


def test_requests_are_bounded_and_a_stall_holds_up_its_own_samples_only():
    texts = ["x" * (1 + i) for i in range(40)]

    def sometimes_slow(request):
        time.sleep(0.4 if len(request["completions"][0]) == 7 else 0.02)
        return servers.lengths(request)

    with server(otherwise=sometimes_slow) as served:
        reward = Reward(make(served, batch_size=1, concurrency=4))
        assert reward(texts, texts, {}).tolist() == [float(len(text)) for text in texts]
        assert served.most == 4
        answered = [len(request["completions"][0]) for request in served.requests]
    assert answered.index(7) < 10 < len(answered) == 40  # asked in order, and the others went on meanwhile


def test_a_server_whose_slowest_answers_take_thirty_times_as_long_loses_those_alone():
    """Of a server with 30 s at the 99th percentile and 1 s else, a second being a hundredth of one."""
    draw, count = np.random.default_rng(0), 200
    slow = set(draw.choice(count, 2, replace=False).tolist())

    def answer(request):
        number = int(request["completions"][0])
        time.sleep(0.30 if number in slow else 0.01)
        return {"scores": [float(number)]}

    texts = [str(i) for i in range(count)]
    with server(otherwise=answer) as served:
        patient = Reward(make(served, retries=0, batch_size=1, concurrency=16))
        assert patient(texts, texts, {}).tolist() == [float(i) for i in range(count)]
        assert served.most > 8
        problems = []
        hasty = Reward(make(served, timeout=0.15, retries=0, batch_size=1, concurrency=16), on_problem=problems.append)
        scores = hasty(texts, texts, {})
    lost = set(scores.isnan().nonzero().flatten().tolist())
    assert slow <= lost  # a busy machine may make others late as well
    assert len(lost) == len(problems) < count / 2


# --- what is kept secret ----------------------------------------------------------------------------------------


def test_neither_the_url_nor_the_headers_reach_a_message():
    secrets = ["hunter2", "s3cret-path", "qu3ry-value", "h3ader-value", "bearer-t0ken"]
    headers = {"X-Key": "h3ader-value", "Authorization": "Bearer bearer-t0ken"}

    @servers.writes
    def echoes(handler):
        said = f"{handler.path} {dict(handler.headers)}".encode()
        handler.write(403, said)

    texts = []
    for answer in (echoes, servers.hangs_up, servers.redirects, b"<", servers.stalls(0.5)):
        problems = []
        with server(otherwise=answer) as served:
            url = served.url.replace("//", "//me:hunter2@") + "/s3cret-path?key=qu3ry-value"
            reward = URLReward(url, headers=headers, timeout=0.1, retries=1, backoff=0.01, on_error="drop")
            Reward(reward, on_problem=problems.append)(PROMPTS, COMPLETIONS, {})
            texts += [p.text for p in problems] + [repr(reward), str(reward), reward.__name__]
        assert served.headers[0]["Authorization"] == "Bearer bearer-t0ken"
        assert served.headers[0]["X-Key"] == "h3ader-value"
        assert served.paths[0] == "/s3cret-path?key=qu3ry-value"
    assert len(texts) == 20
    assert [secret for secret in secrets if any(secret in text for text in texts)] == []
    assert "status 403" in texts[0]


def test_a_url_alone_is_a_server():
    with server() as served:
        assert Reward(served.url)(PROMPTS, COMPLETIONS, {}).tolist() == [1.0, 2.0, 3.0]


def test_a_password_in_the_url_is_basic_authentication():
    with server() as served:
        URLReward(served.url.replace("//", "//me:p%40ss@"))(PROMPTS, COMPLETIONS)
        assert served.headers[0]["Authorization"] == "Basic bWU6cEBzcw=="


@pytest.mark.parametrize("url", ["ftp://host/x", "host:80", "", "http://", "http://me:hunter2/x@host", "http://[::1"])
def test_other_urls_are_refused(url):
    shown = "one that may hold a password" if "@" in url else repr(url)
    with pytest.raises(ValueError, match=re.escape(f"got {shown}")) as raised:
        URLReward(url)
    assert "hunter2" not in str(raised.value)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"timeout must be greater than 0, .* got 0, 3, 0.5"):
        URLReward("http://host", timeout=0)
    with pytest.raises(ValueError, match=r"RewardPolicy.on_error must be .* got 'ignore'"):
        URLReward("http://host", on_error="ignore")


def test_seeded_numbers_are_not_drawn_by_pauses():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    with server(500) as served:
        make(served)(PROMPTS, COMPLETIONS)
    assert random.random() == expected


def test_nothing_is_left_running():
    before = threading.active_count()
    with server(otherwise=500) as served, pytest.raises(RewardServerError):
        Reward(make(served, batch_size=1, retries=0))(PROMPTS, COMPLETIONS, {})
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
