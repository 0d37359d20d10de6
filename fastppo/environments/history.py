"""What happened in an episode: text and tokens by segments, who wrote which, the tool calls, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.rewards.human import visible

PROMPT, SYSTEM, MODEL, REWARD = "black on grey85", "black on cyan3", "black on deep_sky_blue1", "black on plum1"


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, and what came of it."""

    tool: str  # the name that the model wrote; empty if it could not be read
    query: Any  # the text that the tool was given, or its arguments by name
    response: str  # what the history got of it
    error: str = ""  # "", "unparsable", "unknown tool", "exception" or "timeout"
    is_cut: bool = False  # the result was longer than the environment lets through
    seconds: float = 0.0  # from start to end, or to the timeout


class TextHistory:
    """An episode as text and as tokens, in segments of the system (prompt, tools) and of the model.

    Args:
        text: of the first segment, the prompt.
        tokens: of the same, 1-D int64.
        system: whether the system wrote it; the model's tokens are those that are trained on.

    `tokens` (T,) and `token_masks` (T,), 1 on the model's tokens, grow with every segment; `text_spans` and
    `token_spans` say where each begins and ends, `system_spans` whose it is.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True):
        self.text, self.tokens = "", tokens[:0]
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.system_spans: list[bool] = []
        self.token_masks = torch.zeros(0, dtype=torch.int64, device=tokens.device)
        self.completed = self.truncated = False
        self.end_reason = ""  # "submit", "answer", "eos", "no call", "max_turns" or "max_length"; empty before the end
        self.reward: Any = 0.0
        self.calls: list[ToolCall] = []
        self.append_segment(text, tokens, system=system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Append a segment; raise ValueError for one without tokens. A token may be without text."""
        if not len(tokens):
            raise ValueError(f"a segment needs tokens, got none for the text {text!r}; leave it out")
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens])
        self.token_masks = torch.cat([self.token_masks, torch.full_like(tokens, int(not system))])

    def complete(self, truncated: bool = False) -> None:
        """Mark the episode as over, cut off by a limit of tokens if `truncated`."""
        self.completed, self.truncated = True, truncated

    @property
    def last_text_segment(self) -> str:
        """Text of the last segment, whoever wrote it."""
        start, end = self.text_spans[-1]
        return self.text[start:end]

    @property
    def last_model_segment(self) -> str:
        """Text of the model's last segment; empty if it has none."""
        spans = [span for span, system in zip(self.text_spans, self.system_spans, strict=True) if not system]
        return self.text[slice(*spans[-1])] if spans else ""

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first segment's tokens, all later ones, and the mask of these, 1 on the model's."""
        split = self.token_spans[0][1]
        return self.tokens[:split], self.tokens[split:], self.token_masks[split:]

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text in colours, by who wrote what, and the reward."""
        self._show([(self.text[slice(*span)], style) for span, style in self._styled(self.text_spans)], show_legend)

    def show_tokens(self, tokenizer: Any, show_legend: bool = False) -> None:
        """Print the tokens one by one in the same colours."""
        parts = []
        for (start, end), style in self._styled(self.token_spans):
            for token in self.tokens[start:end].tolist():
                # A model may have more tokens than its tokenizer.
                parts += [(tokenizer.convert_ids_to_tokens(token) or f"<{token}>", style), (" ", "")]
        self._show(parts, show_legend)

    def show_colour_legend(self) -> None:
        """Print which colour is whose."""
        legend = [("Prompt", PROMPT), ("System", SYSTEM), ("Model", MODEL), ("Reward", REWARD)]
        _print([("Text colours: ", ""), *(part for name, style in legend for part in ((name, style), (" ", "")))])

    def _styled(self, spans: list[tuple[int, int]]) -> list[tuple[tuple[int, int], str]]:
        styles = [PROMPT, *(SYSTEM if system else MODEL for system in self.system_spans[1:])]
        return list(zip(spans, styles, strict=True))

    def _show(self, parts: list[tuple[str, str]], show_legend: bool) -> None:
        _print([*parts, ("\n\n", ""), (f"Reward: {self.reward}", REWARD)])
        if show_legend:
            self.show_colour_legend()


def _print(parts: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble(*((visible(text), style) for text, style in parts)))
