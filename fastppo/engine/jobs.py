"""What the scheduler moves about: prompts, the jobs that answer them, and the plan of a step. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastppo.engine.blocks import Held


@dataclass(eq=False)
class Prompt:
    """A prompt, and the sequence that holds as much of its KV as is computed."""

    number: int
    length: int
    held: Held | None = None
    seen: int = 0  # tokens that were computed at some time
    jobs: int = 0  # that are not over and have no sequence of their own
    waiting: list[Job] = field(default_factory=list)  # those of them that sit in a row; only while there is `held`


@dataclass(eq=False)
class Job:
    """One response to a prompt."""

    index: int
    prompt: Prompt
    limit: int  # tokens to draw, at most
    drawn: int = 0
    held: Held | None = None
    seen: int = 0  # as the prompt's

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt.length + self.drawn


@dataclass(eq=False)
class Chunk:
    """Tokens start..stop - 1 of a prompt, or of a job that was preempted, to be computed."""

    owner: Prompt | Job
    held: Held  # the owner's, even if a job takes it over in the same step
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether nothing of the owner is left to compute after it."""
        return self.stop == self.owner.length


@dataclass(eq=False)
class Plan:
    """One step. Draws are made for `decode`, then for jobs whose last chunk is in it, then for `starts`."""

    decode: list[Job]  # each computes its last token
    chunks: list[Chunk] = field(default_factory=list)
    starts: list[Job] = field(default_factory=list)  # draw their first token where their prompt ends
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # (group, from, to), after the forward pass

    @property
    def drawing(self) -> list[int]:
        """The places in the call's list of the jobs that draws are made for, in their order."""
        return [job.index for part in (self.decode, self.resumed, self.starts) for job in part]

    @property
    def resumed(self) -> list[Job]:
        """The jobs whose last chunk is in the plan."""
        return [chunk.owner for chunk in self.chunks if chunk.is_last and isinstance(chunk.owner, Job)]
