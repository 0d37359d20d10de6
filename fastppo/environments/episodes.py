"""Episodes side by side on one engine: whoever's turn it is generates, while the tools of others run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.engine.call import Call
from fastppo.engine.engine import Engine
from fastppo.engine.requests import Places
from fastppo.environments.calls import CallFormat, Request, encode_parts
from fastppo.environments.history import TextHistory, ToolCall
from fastppo.environments.pool import Outcome, ToolPool
from fastppo.types import Rollout, edits_of

# Tokens that rows draw between two looks for turns to begin: each beginning costs a forward pass of its own.
_TOKENS_PER_LOOK = 8


class Limits(NamedTuple):
    """What an episode may take."""

    turns: int
    tokens: int  # of prompt and response
    tool_characters: int


@dataclass(eq=False)
class _Episode:
    history: TextHistory
    number: int = -1  # of its request, the same in all its turns
    turns: int = 0
    requests: list[Request] = field(default_factory=list)  # of the turn that waits for its tools
    results: dict[int, ToolCall] = field(default_factory=dict)  # those that have come, by place among the requests
    records: list[Mapping[str, Tensor]] = field(default_factory=list)  # of each turn, over its tokens

    @property
    def start(self) -> int:
        """Position of the next token in the response."""
        return len(self.history.tokens) - self.history.token_spans[0][1]


class Episodes:
    """One run of an environment: histories that hold their first segments, brought to their ends by `run`."""

    def __init__(
        self,
        engine: Engine,
        histories: Sequence[TextHistory],
        sampling: SamplingConfig,
        call_format: CallFormat,
        tools: Mapping[str, Callable[..., Any]],
        pool: ToolPool,
        limits: Limits,
    ):
        self.engine, self.tokenizer, self.sampling = engine, engine.tokenizer, sampling
        self.format, self.tools, self.pool, self.limits = call_format, tools, pool, limits
        self.episodes = [_Episode(history) for history in histories]
        self.ready = list(self.episodes)
        self.waiting: dict[int, tuple[_Episode, int]] = {}  # by ticket: whose request, and which of them
        self.last: Rollout | None = None

    def run(self) -> Rollout:
        """Bring all episodes to their ends; return their responses, with records of the tokens that were drawn."""
        try:
            while self.ready or self.waiting:
                if self.ready:
                    self._generate()
                self._collect(block=not self.ready)
        finally:
            self.engine.release([episode.number for episode in self.episodes])
        return self._rollout()

    def _generate(self) -> None:
        """Run one call of the engine to its end, with all who become ready meanwhile if its cache takes them in."""
        owners, self.ready = self.ready, []
        is_first = owners[0].number < 0
        call = self.engine.open(*self._turns(owners), None if is_first else _places(owners))
        try:
            if is_first:
                for episode, number in zip(owners, call.requests.places.numbers, strict=True):
                    episode.number = number
            self._drive(call, owners)
        except BaseException:
            call.close(is_complete=False)
            raise
        self.last = rollout = call.rollout()
        names = ("logprobs", "entropies", "kept_mass", *(("values",) if rollout.values is not None else ()))
        columns = {name: rollout.split(getattr(rollout, name)) for name in names}
        for request, episode in enumerate(owners):
            episode.records.append({name: column[request] for name, column in columns.items()})

    def _drive(self, call: Call, owners: list[_Episode]) -> None:
        """Run the call to its end; `owners`, one for each of its requests, grow with it."""
        going = dict(enumerate(owners))
        steps = max(1, _TOKENS_PER_LOOK // call.tokens_per_step)
        while call.is_open:
            call.run(steps)
            for request in [request for request in going if call.requests.reasons[request]]:
                self._end_turn(going.pop(request), call, request)
            self._collect(block=False)
            if self.ready and call.is_extensible:
                joining, self.ready = self.ready, []
                prompts, _, limits = self._turns(joining)
                call.extend(prompts, limits, _places(joining))
                going.update(enumerate(joining, len(owners)))
                owners += joining

    def _turns(self, episodes: Sequence[_Episode]) -> tuple[list[Tensor], SamplingConfig, list[int]]:
        """Return what the engine needs for the next turns: all tokens so far, and how many may follow."""
        prompts = [episode.history.tokens for episode in episodes]
        return prompts, self.sampling, [min(self.sampling.max_new_tokens, self._room(e)) for e in episodes]

    def _room(self, episode: _Episode) -> int:
        return self.limits.tokens - len(episode.history.tokens)

    def _end_turn(self, episode: _Episode, call: Call, request: int) -> None:
        """Write a turn into the history; ask its tools, or end the episode."""
        history, drawn = episode.history, list(call.requests.tokens[request])
        episode.turns += 1
        if drawn:
            text = gained_text(self.tokenizer, history.tokens.tolist(), drawn)
            history.append_segment(text, torch.tensor(drawn, device=history.tokens.device), system=False)
        reason, turn = call.requests.reasons[request], history.last_model_segment
        is_whole = reason == "stop" and (self.format.ends_by_token or drawn[-1] not in call.requests.stopping.ids)
        episode.requests = self.format.requests(turn) if is_whole else []
        if reason == "cancelled":
            _end(history, "cancelled", truncated=True)
        elif drawn and self.format.is_final(turn):
            _end(history, "submit")
        elif episode.requests:
            self._ask(episode)
        elif reason == "stop":
            _end(history, "answer" if self.format.ends_by_token else "no call" if is_whole else "eos")
        else:
            is_full = not self._room(episode)
            _end(history, "max_length" if is_full else "no call", truncated=is_full)

    def _ask(self, episode: _Episode) -> None:
        episode.results.clear()
        for place, request in enumerate(episode.requests):
            tool = self.tools.get(request.tool)
            if request.error:
                result = ToolCall("", request.query, f"Unknown tool call: {request.query}", request.error)
            elif tool is None:
                result = ToolCall(request.tool, request.query, f"Unknown tool {request.tool}.", "unknown tool")
            else:
                self.waiting[self.pool.submit(tool, request.query)] = episode, place
                continue
            self._receive(episode, place, result)

    def _collect(self, block: bool) -> None:
        """Hand the outcomes of tools to those who wait for them."""
        for ticket, outcome in self.pool.collect(block and bool(self.waiting)):
            episode, place = self.waiting.pop(ticket)
            request = episode.requests[place]
            self._receive(episode, place, _call_of(request, outcome))

    def _receive(self, episode: _Episode, place: int, result: ToolCall) -> None:
        """Keep a result; with the last one of its turn the segment is written, and the next turn may begin."""
        most = self.limits.tool_characters
        # Half of a surrogate pair, which JSON may write, is no character that could be encoded.
        result = replace(result, response=result.response.encode(errors="replace").decode())
        if len(result.response) > most:
            result = replace(result, response=result.response[: most - 3] + "...", is_cut=True)
        episode.results[place] = result
        if len(episode.results) < len(episode.requests):
            return
        history = episode.history
        results = [episode.results[i] for i in range(len(episode.requests))]
        history.calls += results
        parts = self.format.answer(history.last_model_segment, [one.response for one in results])
        tokens = encode_parts(self.tokenizer, parts)
        if len(tokens) > self._room(episode):
            return _end(history, "max_length", truncated=True)
        history.append_segment("".join(part.text for part in parts), history.tokens.new_tensor(tokens))
        if episode.turns == self.limits.turns:
            history.end_reason = "max_turns"  # and not completed, as in TRL
        elif not self._room(episode):
            _end(history, "max_length", truncated=True)
        else:
            self.ready.append(episode)

    def _rollout(self) -> Rollout:
        """Put the records of all turns together; what tools have written has none: NaN."""
        assert self.last is not None
        histories = [episode.history for episode in self.episodes]
        queries, responses, masks = zip(*(history.split_query_response_tokens() for history in histories), strict=True)
        tokens, drawn = torch.cat(responses), torch.cat(masks).bool()
        records: dict[str, Any] = {"values": None}
        for name in self.episodes[0].records[0]:
            record = records[name] = torch.full(tokens.shape, torch.nan, device=tokens.device)
            record[drawn] = torch.cat([turn[name] for episode in self.episodes for turn in episode.records])
        return replace(
            self.last,
            queries=queries,
            responses=tokens.split([len(response) for response in responses]),
            tokens=tokens,
            finished=torch.tensor([history.completed and not history.truncated for history in histories]),
            reasons=tuple(_reason(history) for history in histories),
            requests=tuple(episode.number for episode in self.episodes),
            starts=(0,) * len(histories),
            token_edits=edits_of(tokens),
            **records,
        )


def _places(episodes: Sequence[_Episode]) -> Places:
    numbers = tuple(episode.number for episode in episodes)
    return Places(numbers, tuple(episode.start for episode in episodes), numbers)


def _end(history: TextHistory, reason: str, truncated: bool = False) -> None:
    history.end_reason = reason
    history.complete(truncated)


def _reason(history: TextHistory) -> str:
    if history.end_reason == "cancelled":
        return "cancelled"
    return "stop" if history.completed and not history.truncated else "length"


def _call_of(request: Request, outcome: Outcome) -> ToolCall:
    error = "timeout" if isinstance(outcome.error, TimeoutError) else "exception" if outcome.error is not None else ""
    response = f"Tool error: {_said(outcome.error)}" if outcome.value is None else outcome.value
    return ToolCall(request.tool, request.query, response, error, seconds=outcome.seconds)


def _said(error: BaseException | None) -> str:
    try:
        return str(error)
    except Exception:  # as an integer of 5,000 digits has no text
        return type(error).__name__


def gained_text(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """Return what tokens add to the text before them: the first may have lost its space where it stands alone."""
    start: str = tokenizer.decode(before)
    whole: str = tokenizer.decode(before + tokens)
    return whole[len(start) :] if whole.startswith(start) else str(tokenizer.decode(tokens))
