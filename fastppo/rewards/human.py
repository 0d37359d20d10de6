"""A person as the reward: rates or compares, in the terminal or through files; every answer is kept."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastppo.atomic import Pathlike, append_line
from fastppo.rewards.policy import RewardPolicy

_RATINGS = {rating: float(rating) for rating in range(1, 6)}
_GAINS = {"first": 1.0, "second": -1.0, "tie": 0.0}  # the first one's; the second one's is the opposite
# What is typed, and what the file says for it.
_RATING_KEYS = {str(rating): rating for rating in _RATINGS}
_CHOICE_KEYS = {"1": "first", "2": "second", "=": "tie"}


class HumanReward:
    """Scores by a person: ratings from 1 to 5; with `compare`, 1 for the better of two, -1 for the worse, 0 for ties.

    To compare, samples of the same prompt are paired first, then what is left over; an odd one out is compared with one
    that has been, whose score is the mean of its two. A sample that is skipped has no score.

    Answers are appended to a JSON-lines file as they are given, keyed by the texts they are about, and are not asked
    for again: not after an interrupt, nor in another run with the same file.

    Args:
        answers: that file. A line is `{"id": ..., "rating": 4}`, or `{"id": ..., "better": "first"}` ("second", "tie");
            null skips. Of several lines with one id the last counts.
        compare: ask which of two is better.
        questions: None asks in the terminal. A path asks through files: questions are appended to it, a JSON object
            with `id` and the texts a line, and `answers` is read until a person or a program has answered them all.
        timeout: seconds to wait for answers in the file; what is not answered has no score. None waits for ever.
        poll: seconds between looks at the file.
        ask: shows its argument and returns what is typed; None is Python's `input`.

    Raises ValueError if questions are to be asked in a terminal and standard input is none.
    """

    # Only the main thread can ask, and a person may take an hour.
    reward_policy = RewardPolicy(timeout=None)

    def __init__(
        self,
        answers: Pathlike,
        *,
        compare: bool = False,
        questions: Pathlike | None = None,
        timeout: float | None = None,
        poll: float = 1.0,
        ask: Callable[[str], str] | None = None,
    ):
        if questions is None and ask is None and not sys.stdin.isatty():
            raise ValueError(
                "HumanReward asks in the terminal, but standard input is not one; pass questions=PATH to ask through "
                "a file, or start the program in a terminal"
            )
        self.answers, self.compare, self.timeout, self.poll = Path(answers), compare, timeout, poll
        self.questions = None if questions is None else Path(questions)
        self._ask = input if ask is None else ask
        self.answers.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self.answers)
        self._field = "better" if compare else "rating"
        self._keys: dict[str, Any] = dict(_CHOICE_KEYS if compare else _RATING_KEYS) | {"s": None}
        self._values: dict[Any, float | None] = {None: None, **(_GAINS if compare else _RATINGS)}
        self._known: dict[str, float | None] = {}
        self._asked: set[str] = set()  # ids in the file of questions
        if self.questions is not None and self.questions.exists():
            _end_last_line(self.questions)
            self._asked = _ids(self.questions.read_text(encoding="utf-8", errors="replace").split("\n"))
        self._seen: tuple[int, int] | None = None  # time and size of the file of answers when it was read
        self._refused: set[str] = set()  # its lines that were warned of
        self._update()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """Return one score per completion, None for those that were skipped. An end of input interrupts."""
        samples = [(_text(prompt), _text(text)) for prompt, text in zip(prompts, completions, strict=True)]
        if not self.compare:
            return self._answered([_question(sample) for sample in samples])
        # The same two texts are the same question whichever comes first.
        pairs = [sorted(pair, key=lambda row: samples[row]) for pair in _pairs([prompt for prompt, _ in samples])]
        gained: list[list[float]] = [[] for _ in samples]
        questions = [_question(samples[first], samples[second]) for first, second in pairs]
        for (first, second), question in zip(pairs, questions, strict=True):
            if samples[first] == samples[second]:
                self._known[question["id"]] = 0.0  # nobody need say so
        found = self._answered(questions)
        for (first, second), gain in zip(pairs, found, strict=True):
            if gain is not None:
                gained[first].append(gain)
                gained[second].append(-gain)
        return [sum(gains) / len(gains) if gains else None for gains in gained]

    def _answered(self, questions: list[dict[str, str]]) -> list[float | None]:
        open_ = {question["id"]: question for question in questions if question["id"] not in self._known}
        if self.questions is None:
            for number, question in enumerate(open_.values(), start=1):
                self._ask_about(question, f"[{number} of {len(open_)}]")
        else:
            self._wait_for(open_)
        return [self._known.get(question["id"]) for question in questions]

    # --- in the terminal --------------------------------------------------------------------------------------

    def _ask_about(self, question: dict[str, str], place: str) -> None:
        wanted = "1 or 2, = for a tie" if self.compare else "1 (bad) to 5 (good)"
        shown = "".join(f"\n{name.upper()}: {visible(text)}" for name, text in question.items() if name != "id")
        line = f"\n{place}{shown}\n{'Which is better' if self.compare else 'How good'}? {wanted}, s to skip: "
        typed = self._typed(line)
        while typed not in self._keys:
            typed = self._typed(f"{visible(typed)!r} is none of these: {wanted}, s to skip: ")
        append_line(self.answers, json.dumps({**question, self._field: self._keys[typed]}, ensure_ascii=False))
        self._known[question["id"]] = self._values[self._keys[typed]]

    def _typed(self, line: str) -> str:
        try:
            return self._ask(line).strip().lower()
        except EOFError:
            raise KeyboardInterrupt("the input ended; what was answered is kept") from None

    # --- through files ----------------------------------------------------------------------------------------

    def _wait_for(self, questions: dict[str, dict[str, str]]) -> None:
        assert self.questions is not None
        for key, question in questions.items():
            if key not in self._asked:
                append_line(self.questions, json.dumps(question, ensure_ascii=False))
                self._asked.add(key)
        end = None if self.timeout is None else time.monotonic() + self.timeout
        self._update()
        while not questions.keys() <= self._known.keys() and (end is None or time.monotonic() < end):
            time.sleep(self.poll)
            self._update()

    def _update(self) -> None:
        """Read the file of answers, if it has changed; a last line that is no JSON yet may still be being written."""
        try:
            status = self.answers.stat()
        except FileNotFoundError:
            return
        if (status.st_mtime_ns, status.st_size) == self._seen:
            return
        self._seen = (status.st_mtime_ns, status.st_size)
        *lines, last = self.answers.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in [*lines, last] if _ids([last]) else lines:
            if line.strip() and line not in self._refused:
                self._take_in(line)

    def _take_in(self, line: str) -> None:
        try:
            answer = json.loads(line)
            if self._field in answer or not {"rating", "better"} & answer.keys():  # others are of another HumanReward
                self._known[str(answer["id"])] = self._values[answer[self._field]]
        except (ValueError, KeyError, TypeError, AttributeError):
            self._refused.add(line)
            values = ", ".join(json.dumps(value) for value in self._values)
            warnings.warn(
                f'{self.answers} has the line {line!r:.200}, expected {{"id": ..., "{self._field}": one of {values}}}; '
                "it is left out until it is mended",
                stacklevel=5,
            )


def _question(first: tuple[str, str], second: tuple[str, str] | None = None) -> dict[str, str]:
    """Return the texts of a question, and the id that they have in every run."""
    if second is None:
        texts = {"prompt": first[0], "completion": first[1]}
    elif first[0] == second[0]:
        texts = {"prompt": first[0], "first": first[1], "second": second[1]}
    else:
        texts = {"first": "\n".join(first), "second": "\n".join(second)}
    content = json.dumps([first, second], ensure_ascii=True).encode()
    return {"id": hashlib.sha256(content).hexdigest()[:32], **texts}


def _pairs(prompts: Sequence[str]) -> list[tuple[int, int]]:
    """Pair the rows of each prompt, then those left over; an odd one out with the row before it, or the first."""
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    pairs, left = [], []
    for rows in by_prompt.values():
        pairs += list(zip(rows[::2], rows[1::2], strict=False))
        left += rows[len(rows) - len(rows) % 2 :]
    pairs += list(zip(left[::2], left[1::2], strict=False))
    if len(left) % 2 and len(prompts) > 1:
        alone = left[-1]
        mates = [row for row in by_prompt[prompts[alone]] if row != alone]
        pairs.append((alone, mates[0] if mates else (alone + 1) % len(prompts)))
    return pairs


def _text(given: Any) -> str:
    """Return a prompt or completion as text: a chat message by message, token ids as they are."""
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and given and isinstance(given[0], dict):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in given)
    return str(given)


def visible(text: str) -> str:
    """Return a text without characters that a terminal would obey; a model can write any."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _ids(lines: Sequence[str]) -> set[str]:
    """Return the ids in JSON lines, leaving out what is no such line."""
    found = set()
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            found.add(str(json.loads(line)["id"]))
    return found


def _end_last_line(path: Path) -> None:
    """End a line that a crash cut off, so that the next answer does not become part of it."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
