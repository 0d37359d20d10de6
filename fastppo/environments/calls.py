"""How a model calls a tool, and how it is told the result: tags as in TRL, or JSON in a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

_UNREADABLE = "unparsable"
_STAND_IN = "fastppostandin"  # a text that no template changes


@dataclass(frozen=True)
class Request:
    """What a turn asks for. `query` is a text, or arguments by name; `error` says why it cannot be read."""

    tool: str
    query: Any
    error: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of what the environment writes; a tool's words are not trusted, the format's own are."""

    text: str
    is_trusted: bool


class CallFormat(Protocol):
    """What differs between the ways of calling tools."""

    stop_strings: tuple[str, ...]
    ends_by_token: bool  # a turn that asks for a tool ends with an end-of-sequence token
    adds_special_tokens: bool  # to the first segment, when it is encoded

    def first(self, task: Any) -> str:
        """Return the text of an episode's first segment. Raises ValueError for what is no task."""

    def is_final(self, turn: str) -> bool:
        """Whether a turn says itself that the episode is over."""

    def requests(self, turn: str) -> list[Request]:
        """Return what a turn asks for, empty if it calls no tool."""

    def answer(self, turn: str, results: Sequence[str]) -> list[Part]:
        """Return the segment that follows the turn: the result of each of its requests."""


class TagCalls:
    """`<request><Tool>query<call>`, answered by `result<response>`; `<submit>` ends the episode."""

    request, call, response, submit = "<request>", "<call>", "<response>", "<submit>"
    stop_strings: tuple[str, ...] = (call, submit)
    ends_by_token, adds_special_tokens = False, True

    def __init__(self, prompt: str):
        self._prompt = prompt

    def first(self, task: Any) -> str:
        """Return prompt and task."""
        if not isinstance(task, str) or not self._prompt + task:
            raise ValueError(f"a task is {task!r}; expected a text that is not empty, or call_format='chat' for chats")
        return self._prompt + task

    def is_final(self, turn: str) -> bool:
        """Whether the turn submits."""
        return self.submit in turn

    def requests(self, turn: str) -> list[Request]:
        """Return the one request of a turn, unreadable if no tool is named between the tags."""
        if self.request not in turn or self.call not in turn:
            return []
        tool, query = parse_tool_call(turn)
        return [Request("", turn, _UNREADABLE) if tool is None else Request(tool, query)]

    def answer(self, turn: str, results: Sequence[str]) -> list[Part]:
        """Return the result and its tag."""
        return [Part(results[0], False), Part(self.response, True)]


def parse_tool_call(text: str) -> tuple[str | None, str | None]:
    """Return tool and query of the first `<request><Tool>query<call>`, or (None, None) if there is none."""
    asked = re.search(f"{TagCalls.request}(.*?){TagCalls.call}", text, re.DOTALL)
    named = asked and re.search("<(.*?)>(.*)", asked[1], re.DOTALL)
    return (named[1], named[2]) if named else (None, None)


class ChatCalls:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in the turns of a chat, as Hermes and Qwen write it.

    The template renders the first segment, and once the frame of a tool's answer; what the model wrote is never
    rendered again. Raises ValueError for a tokenizer without a chat template, and for a template in which a turn that
    has been written changes when others follow.
    """

    stop_strings: tuple[str, ...] = ()
    ends_by_token, adds_special_tokens = True, False

    def __init__(self, prompt: str, tokenizer: Any, tools: Mapping[str, Callable[..., Any]]):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("call_format='chat' needs a tokenizer with a chat template; this one has none")
        self._system = [{"role": "system", "content": prompt}] if prompt else []
        self._tokenizer = tokenizer
        self._schemas = [schema_of(name, tool) for name, tool in tools.items()]
        self._frame = cache(self._make_frame)
        self._frame(1)

    def first(self, task: Any) -> str:
        """Return the chat up to where the model answers; a text is a user's message."""
        messages = [{"role": "user", "content": task}] if isinstance(task, str) else task
        if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
            raise ValueError(f"a task is {task!r}; expected a text, or a list of messages with role and content")
        return self._render([*self._system, *messages], True)

    def is_final(self, turn: str) -> bool:
        """Return False: a turn that calls no tool is the last."""
        return False

    def requests(self, turn: str) -> list[Request]:
        """Return all requests of a turn, in their order."""
        return [_parse_json_call(text) for text in re.findall("<tool_call>(.*?)</tool_call>", turn, re.DOTALL)]

    def answer(self, turn: str, results: Sequence[str]) -> list[Part]:
        """Return what the template adds to a turn for these results, up to where the model goes on."""
        frame = self._frame(len(results))
        written = next(size for size in range(len(frame[0]), -1, -1) if turn.endswith(frame[0][:size]))
        parts = [Part(frame[0][written:], True)]
        for result, following in zip(results, frame[1:], strict=True):
            parts += [Part(result, False), Part(following, True)]
        return parts

    def _make_frame(self, count: int) -> list[str]:
        """Return the template's text around `count` results, from where the model stops writing."""
        answers = [f"{_STAND_IN}{i}." for i in range(count)]  # none is the beginning of another
        asked = [*self._system, {"role": "user", "content": "question"}]
        said = [*asked, {"role": "assistant", "content": _STAND_IN}]
        told = [*said, *({"role": "tool", "content": content} for content in answers)]
        before, turn, whole = self._render(asked, True), self._render(said, False), self._render(told, True)
        head = before + _STAND_IN
        pieces = re.split("|".join(map(re.escape, answers)), whole[len(head) :])
        if not turn.startswith(head) or not whole.startswith(turn.rstrip()) or len(pieces) != count + 1:
            raise ValueError(
                f"this chat template does not append a tool's answer to the turns before it: {turn[len(before) :]!r} "
                f"becomes {whole[len(before) :]!r}; use one that leaves written turns alone, or call_format='tags'"
            )
        return pieces

    def _render(self, messages: Sequence[Any], is_open: bool) -> str:
        options = {"tools": self._schemas or None, "add_generation_prompt": is_open, "tokenize": False}
        text: str = self._tokenizer.apply_chat_template(messages, **options)
        return text


def _parse_json_call(text: str) -> Request:
    try:
        call = json.loads(text)
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(call["name"], str) and isinstance(arguments, dict):
            return Request(call["name"], arguments)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return Request("", text.strip(), _UNREADABLE)


def schema_of(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a tool, from its signature's types and its docstring (`Args:` and a line for each)."""
    from transformers.utils import get_json_schema

    function = tool if hasattr(tool, "__name__") else type(tool).__call__
    schema: dict[str, Any] = get_json_schema(function)
    schema["function"]["name"] = name
    schema["function"]["parameters"]["properties"].pop("self", None)
    return schema


def encode_parts(tokenizer: Any, parts: Sequence[Part]) -> list[int]:
    """Encode a segment without adding special tokens, and without making any of what a tool has written."""
    options = {"add_special_tokens": False}
    text = "".join(part.text for part in parts)
    spoken = " ".join(part.text for part in parts if not part.is_trusted)
    if not any(token in spoken for token in tokenizer.all_special_tokens):
        return list(tokenizer(text, **options)["input_ids"])
    pieces = [tokenizer(part.text, split_special_tokens=not part.is_trusted, **options) for part in parts if part.text]
    return [token for piece in pieces for token in piece["input_ids"]]
