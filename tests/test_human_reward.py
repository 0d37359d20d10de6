"""A person as the reward: what is asked, what an answer is worth, and that none is lost."""

import json
import threading
import time

import pytest

from fastppo.rewards import HumanReward, Reward

PROMPTS, COMPLETIONS = ["tell me", "tell me", "why?"], ["a story", "a lie", "because"]


class Person:
    """Types these answers one after the other, and remembers what was shown."""

    def __init__(self, *typed):
        self.typed, self.shown = list(typed), []

    def __call__(self, shown):
        self.shown.append(shown)
        answer = self.typed.pop(0)
        if isinstance(answer, type):
            raise answer
        return answer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ratings_are_scores_and_a_skipped_sample_has_none(tmp_path):
    person = Person("4", " 5\n", "s")
    reward = HumanReward(tmp_path / "answers.jsonl", ask=person)
    assert reward(PROMPTS, COMPLETIONS) == [4.0, 5.0, None]
    assert "[1 of 3]\nPROMPT: tell me\nCOMPLETION: a story\nHow good? 1 (bad) to 5 (good)" in person.shown[0]
    assert [(row["completion"], row["rating"]) for row in lines(tmp_path / "answers.jsonl")] == [
        ("a story", 4),
        ("a lie", 5),
        ("because", None),
    ]
    assert Reward(reward)(PROMPTS, COMPLETIONS, {}).isnan().tolist() == [False, False, True]


def test_nothing_is_asked_twice_in_this_run_or_the_next(tmp_path):
    path = tmp_path / "made" / "answers.jsonl"
    first = HumanReward(path, ask=Person("1", "2"))
    assert first(PROMPTS[:2] * 2, COMPLETIONS[:2] * 2) == [1.0, 2.0] * 2
    person = Person("3")
    again = HumanReward(path, ask=person)
    assert again(PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]
    assert "because" in person.shown[0]
    chat = [{"role": "user", "content": "tell me"}]
    assert HumanReward(path, ask=Person("5"))([chat], ["a story"]) == [5.0]  # another prompt


def test_a_wrong_key_is_asked_again_and_terminal_codes_are_not_obeyed(tmp_path):
    person = Person("6", "good\x1b", "", "2")
    assert HumanReward(tmp_path / "a.jsonl", ask=person)(["\x1b[2Jp"], ["\x1b]0;title\x07 é\n→"]) == [2.0]
    assert r"PROMPT: \x1b[2Jp" in person.shown[0]
    assert "COMPLETION: \\x1b]0;title\\x07 é\n→" in person.shown[0]
    assert "'6' is none of these" in person.shown[1]
    assert "\x1b" not in "".join(person.shown)
    assert lines(tmp_path / "a.jsonl")[0]["prompt"] == "\x1b[2Jp"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, EOFError])
def test_an_interrupt_loses_no_answer(tmp_path, interrupt):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        HumanReward(path, ask=Person("1", "2", interrupt))(PROMPTS, COMPLETIONS)
    with open(path, "a") as file:
        file.write('{"id": "cut off by a cra')
    with pytest.warns(UserWarning, match=r"has the line '\{\"id\": \"cut off by a cra', expected"):
        again = HumanReward(path, ask=Person("3"))
    assert again(PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]
    with pytest.warns(UserWarning, match="cut off"):
        assert HumanReward(path, ask=Person())(PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]


def test_without_a_terminal_it_refuses_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"standard input is not one; pass questions=PATH to ask through a file"):
        HumanReward(tmp_path / "answers.jsonl")


# --- comparisons ------------------------------------------------------------------------------------------------


def test_the_better_of_two_gains_what_the_other_loses(tmp_path):
    path = tmp_path / "answers.jsonl"
    person = Person("1", "2")
    # "a lie" and "a story" share a prompt; the third is compared with one that has been compared.
    got = HumanReward(path, compare=True, ask=person)(PROMPTS, COMPLETIONS)
    assert "PROMPT: tell me\nFIRST: a lie\nSECOND: a story\nWhich is better? 1 or 2, = for a tie" in person.shown[0]
    assert "FIRST: tell me\na story\nSECOND: why?\nbecause" in person.shown[1]
    assert got == [(-1.0 - 1.0) / 2, 1.0, 1.0]
    assert [row["better"] for row in lines(path)] == ["first", "second"]
    swapped = HumanReward(path, compare=True, ask=Person())(PROMPTS[:2], COMPLETIONS[1::-1])
    assert swapped == [1.0, -1.0]  # the same question the other way round


def test_ties_skips_and_twins(tmp_path):
    compare = HumanReward(tmp_path / "a.jsonl", compare=True, ask=Person("=", "s"))
    prompts = ["p", "p", "q", "q", "r", "r"]
    assert compare(prompts, ["x", "y", "x", "y", "same", "same"]) == [0.0, 0.0, None, None, 0.0, 0.0]
    assert compare(["p"], ["alone"]) == [None]


def test_ratings_and_comparisons_may_share_a_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert HumanReward(path, ask=Person("4", "4"))(PROMPTS[:2], COMPLETIONS[:2]) == [4.0, 4.0]
    assert HumanReward(path, compare=True, ask=Person("2"))(PROMPTS[:2], COMPLETIONS[:2]) == [1.0, -1.0]
    assert HumanReward(path, ask=Person())(PROMPTS[:2], COMPLETIONS[:2]) == [4.0, 4.0]


# --- through files ----------------------------------------------------------------------------------------------


def answering(questions, answers, rate, stop):
    """A program that answers each new question, each in two writes."""
    done = 0
    while not stop.is_set():
        rows = questions.read_text().split("\n")[:-1] if questions.exists() else []
        for row in rows[done:]:
            line = json.dumps({"id": json.loads(row)["id"], "rating": rate(json.loads(row))}) + "\n"
            with open(answers, "a") as file:
                file.write(line[:9])
                file.flush()
                time.sleep(0.02)
                file.write(line[9:])
        done = len(rows)
        time.sleep(0.005)


def test_questions_and_answers_through_files(tmp_path):
    questions, answers, stop = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl", threading.Event()
    rates = {"a story": 5, "a lie": 1, "because": None}
    arguments = (questions, answers, lambda row: rates[row["completion"]], stop)
    thread = threading.Thread(target=answering, args=arguments, daemon=True)
    thread.start()
    reward = HumanReward(answers, questions=questions, poll=0.005)
    for _ in range(2):
        assert reward(PROMPTS, COMPLETIONS) == [5.0, 1.0, None]
    stop.set()
    thread.join()
    assert len(lines(questions)) == 3
    assert set(lines(questions)[0]) == {"id", "prompt", "completion"}


def test_what_nobody_answers_in_time_has_no_score_and_can_be_answered_later(tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    reward = HumanReward(answers, questions=questions, poll=0.005, timeout=0.02)
    assert reward(PROMPTS[:1], COMPLETIONS[:1]) == [None]
    key = lines(questions)[0]["id"]
    answers.write_text(json.dumps({"id": key, "rating": 7}) + "\n" + '{"id": "x"}\nnonsense\n')
    with pytest.warns(UserWarning, match=r'expected \{"id": ..., "rating": one of null, 1, 2, 3, 4, 5\}') as warned:
        assert reward(PROMPTS[:1], COMPLETIONS[:1]) == [None]
    assert len(warned) == 3
    answers.write_text(json.dumps({"id": key, "rating": 2}) + "\n")  # mended with an editor
    assert reward(PROMPTS[:1], COMPLETIONS[:1]) == [2.0]
    assert len(lines(questions)) == 1


def test_a_new_run_repeats_no_question_and_reads_a_last_line_without_its_end(tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    settings = {"questions": questions, "poll": 0.005, "timeout": 0.02}
    HumanReward(answers, **settings)(PROMPTS[:2], COMPLETIONS[:2])
    with open(questions, "a") as file:
        file.write('{"id": "cut off by a cra')
    again = HumanReward(answers, **settings)
    assert again(PROMPTS, COMPLETIONS) == [None] * 3
    asked = [json.loads(line) for line in questions.read_text().splitlines() if "cut off" not in line]
    assert [row["completion"] for row in asked] == COMPLETIONS
    rated = [json.dumps({"id": row["id"], "rating": 3 + i}) for i, row in enumerate(asked)]
    answers.write_text("\n".join(rated)[:-1])
    assert again(PROMPTS, COMPLETIONS) == [3.0, 4.0, None]
    answers.write_text("\n".join(rated))  # as many editors and programs end a file
    assert again(PROMPTS, COMPLETIONS) == [3.0, 4.0, 5.0]
