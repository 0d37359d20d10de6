"""Chats as training text: rendered by the tokenizer's template, with the characters that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, Any]
Span = tuple[int, int]
_ROLES = {"human": "user", "gpt": "assistant"}  # of the `from` and `value` form
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def is_chat(value: Any) -> bool:
    """Whether a column holds messages rather than a text."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def messages_of(value: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, also where they came as `from` and `value`."""
    return [
        {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if "from" in message and "value" in message
        else dict(message)
        for message in value
    ]


class ChatTemplate:
    """The chat template of a tokenizer, applied to rows of a dataset, whose `tools` it gets too.

    Raises ValueError for a tokenizer without a template.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"a row holds a chat, but {type(tokenizer).__name__} has no chat template; set "
                "tokenizer.chat_template, or make texts with formatting_func="
            )
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], row: Mapping[str, Any], asks: bool = False) -> str:
        """Return the text of a chat; `asks` adds what precedes the next answer."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks, **_given(row)
        )
        return text

    def completion(self, prompt: Sequence[Message], completion: Sequence[Message], row: Any) -> tuple[str, list[Span]]:
        """Return the text of a chat and where its last part, the completion, stands in it."""
        before, text = self.render(prompt, row, asks=True), self.render([*prompt, *completion], row)
        _check_prefix(before, text, "the prompt")
        return text, [(len(before), len(text))]

    def answers(self, messages: Sequence[Message], row: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """Return the text of a chat and where the assistant's messages stand in it.

        The template says so itself where it marks them by {% generation %}. Otherwise an answer is what the chat up to
        it has more than the chat that asks for it: its end mark too, and whatever stands before the next turn. Raises
        ValueError for a template that writes earlier turns differently once the chat goes on.
        """
        template = self.tokenizer.get_chat_template()
        if _MARKED.search(template):
            return _render_marked(template, messages, {**self.tokenizer.special_tokens_map, **_given(row)})
        text, spans = self.render(messages, row), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:number], row, asks=True) if number else ""
                after = self.render(messages[: number + 1], row)
                for part, name in ((before, "what precedes an answer"), (after, "the chat up to an answer")):
                    _check_prefix(part, text, name)
                spans.append((len(before), len(after)))
        return text, spans


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row tells the template besides the messages."""
    return {"tools": row.get("tools") or None, **(row.get("chat_template_kwargs") or {})}


def _render_marked(template: str, messages: Sequence[Message], given: dict[str, Any]) -> tuple[str, list[Span]]:
    # Not by transformers' mask of tokens, in which a mark that ends at a space reaches to the end of the chat.
    texts, spans = render_jinja_template(
        [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **given
    )
    return texts[0], [(begin, end) for begin, end in spans[0]]


def _check_prefix(part: str, text: str, name: str) -> None:
    if not text.startswith(part):
        same = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))
        raise ValueError(
            f"the chat template writes {name} alone otherwise than in the whole chat: {part[same : same + 40]!r} where "
            f"the chat has {text[same : same + 40]!r}; mark the answers in the template with {{% generation %}}, or "
            "give rows of text with `prompt` and `completion`"
        )
