"""TextEnvironment: tasks that a model works on in several turns with tools, under TRL's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine.engine import Engine
from fastppo.environments.calls import CallFormat, ChatCalls, TagCalls
from fastppo.environments.episodes import Episodes, Limits
from fastppo.environments.history import TextHistory
from fastppo.environments.pool import ToolPool
from fastppo.models.network import causal_lm, context_length
from fastppo.rewards import parse_scores

_FORMATS = ("tags", "chat")


class TextEnvironment:
    """Lets a model work on tasks in several turns, calling tools, and scores what it ends with.

    In a turn the model writes `<request><Tool>query<call>`, which is answered by `result<response>`, or ends the
    episode with `<submit>`, its end-of-sequence token, or a turn that calls nothing. Episodes run side by side: one
    whose tool is slow does not hold up the others, and what was computed of a turn is kept for the next.

    Args:
        model: a causal language model, with a value head or without, an `Engine`, or a `PPOTrainer`.
        tokenizer: needed unless the engine or the trainer has one.
        tools: callables by name, or a list of them, named as the function or the class is. They take the query.
        reward_fn: (texts of each episode's last model turn, **reward_kwargs of `run`) -> one number each, or None.
        prompt: put before every task; for chats the system message.
        max_turns: turns of the model, at most.
        max_tool_reponse: characters of a tool's result that the model gets to see; TRL's spelling.
        max_length: tokens of an episode, prompt included, at most; by default as many as the model's context holds.
        generation_kwargs: transformers' generation arguments, of each turn; or a `SamplingConfig`.
        max_tool_response: the same as `max_tool_reponse`.
        call_format: "tags" as above, or "chat": tasks are chats or texts, rendered by the tokenizer's chat template,
            and tools are called as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, with arguments by name.
        tool_timeout: seconds that a tool may take.
        max_parallel_tools: tools that run at the same time, in threads.

    Raises ValueError for arguments that cannot work.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        tools: Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]] | None = None,
        reward_fn: Callable[..., Any] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | SamplingConfig | None = None,
        *,
        max_tool_response: int | None = None,
        call_format: str = "tags",
        tool_timeout: float = 10.0,
        max_parallel_tools: int = 16,
    ):
        self.engine = _engine_of(model, tokenizer)
        self._trainer = model if hasattr(model, "engine") else None
        self.tokenizer, self.reward_fn, self.prompt = self.engine.tokenizer, reward_fn, prompt or ""
        self.tools = named_tools(tools)
        self.max_turns, self.max_length = max_turns, max_length
        self.max_tool_response = max_tool_reponse if max_tool_response is None else max_tool_response
        self.tool_timeout, self.max_parallel_tools = tool_timeout, max_parallel_tools
        least = {"max_turns": 1, "max_tool_response": 3, "max_length": 2, "max_parallel_tools": 1}
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)!r}")
        if not tool_timeout > 0:
            raise ValueError(f"tool_timeout must be greater than 0 seconds, got {tool_timeout!r}")
        if call_format not in _FORMATS:
            raise ValueError(f"call_format must be one of {_FORMATS}, got {call_format!r}")
        self.call_format: CallFormat = (
            TagCalls(self.prompt) if call_format == "tags" else ChatCalls(self.prompt, self.tokenizer, self.tools)
        )
        given = generation_kwargs or {}
        sampling = given if isinstance(given, SamplingConfig) else SamplingConfig.from_generation_kwargs(**given)
        self.sampling = replace(sampling, stop_strings=(*sampling.stop_strings, *self.call_format.stop_strings))

    def run(
        self, tasks: Sequence[Any], /, **reward_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """Run an episode for each task; return (queries, responses, masks, rewards, histories).

        `queries` are the first segments' tokens, `responses` all that follow, 1-D int64, and `masks` 1 on the model's
        tokens: `trainer.step(queries, responses, rewards, response_masks=masks)` takes them as they are. The responses
        are a `Rollout`, whose records spare `step` a forward pass. `reward_kwargs` go to the reward function; without
        one the rewards are None. Errors and timeouts of tools are not raised: the model reads them, and
        `history.calls` lists them.

        Raises ValueError for a task that is none, or longer than an episode may be, and for rewards that are no
        numbers or not as many as tasks.
        """
        histories = self._begin(tasks)
        pool = ToolPool(self.max_parallel_tools, self.tool_timeout)
        limits = Limits(self.max_turns, self._token_limit(), self.max_tool_response)
        episodes = Episodes(self.engine, histories, self.sampling, self.call_format, self.tools, pool, limits)
        responses = episodes.run()
        if self._trainer is not None:  # for responses that come to its step as a plain list
            self._trainer.temperature = responses.temperature
        rewards = self._score(histories, reward_kwargs)
        masks = [history.split_query_response_tokens()[2] for history in histories]
        return list(responses.queries), responses, masks, rewards, histories

    def _begin(self, tasks: Sequence[Any]) -> list[TextHistory]:
        """Return histories with the tasks in them."""
        if isinstance(tasks, str) or not len(tasks):
            raise ValueError(f"tasks are {tasks!r}; expected a list with at least one task")
        texts = [self.call_format.first(task) for task in tasks]
        options = {"add_special_tokens": self.call_format.adds_special_tokens}
        ids = self.engine.encode([self.tokenizer(text, **options)["input_ids"] for text in texts])
        limit = self._token_limit()
        for number, tokens in enumerate(ids):
            if len(tokens) >= limit:
                raise ValueError(
                    f"task {number} has {len(tokens)} tokens with its prompt, but an episode may have {limit} (the "
                    "least of max_length and the model's context); shorten it, or raise max_length"
                )
        return [TextHistory(text, tokens) for text, tokens in zip(texts, ids, strict=True)]

    def _token_limit(self) -> int:
        given = [self.max_length, context_length(self.engine.model)]
        return min((limit for limit in given if limit is not None), default=2**31)

    def _score(self, histories: Sequence[TextHistory], reward_kwargs: Mapping[str, Any]) -> list[Any]:
        rewards: list[Any] = [None] * len(histories)
        if self.reward_fn is not None:
            given = self.reward_fn([history.last_model_segment for history in histories], **reward_kwargs)
            rewards = [None if math.isnan(score) else score for score in parse_scores(given, len(histories)).tolist()]
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward
        return rewards


def named_tools(
    tools: Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]] | None,
) -> dict[str, Callable[..., Any]]:
    """Return tools by name. Raises ValueError for one that cannot be called, or whose name cannot be written."""
    if not isinstance(tools, Mapping):
        listed = list(tools or ())
        tools = {getattr(tool, "__name__", type(tool).__name__): tool for tool in listed}
        if len(tools) < len(listed):
            raise ValueError(f"two of the tools {sorted(tools)} have the same name; pass a dict of tools by name")
    for name, tool in tools.items():
        if not callable(tool):
            raise ValueError(f"tool {name!r} is {tool!r}, which cannot be called; pass a function or an object like it")
        if not name or {"<", ">"} & set(name):
            raise ValueError(f"a tool is named {name!r}, which a model cannot write in tags; pass a dict of names")
    return dict(tools)


def _engine_of(model: Any, tokenizer: Any) -> Engine:
    engine = getattr(model, "engine", model)  # a trainer's
    if not isinstance(engine, Engine):
        if not hasattr(model, "parameters"):
            raise ValueError(f"model must be a language model, an Engine or a PPOTrainer, got {type(model).__name__}")
        engine = Engine(model, tokenizer)
    known = engine.tokenizer
    if known is None or (tokenizer not in (None, known) and tokenizer.get_vocab() != known.get_vocab()):
        raise ValueError(
            f"the engine has {'no' if known is None else 'another'} tokenizer; make it, or the trainer, with the one "
            "that belongs to the model"
        )
    if causal_lm(engine.model).config.is_encoder_decoder:
        raise ValueError("TextEnvironment needs a causal language model; an encoder-decoder cannot go on with a text")
    return engine
