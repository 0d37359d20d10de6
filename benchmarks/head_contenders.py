"""Who takes part in the loss-head benchmark: ours, plain torch, every peer that can be imported, and the bare GEMMs."""

import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastppo
from benchmarks import head_problem
from benchmarks.head_problem import CLIP, CROSS_ENTROPY, ENTROPY_COEF, PPO, PPO_ALONE, Outputs, Problem
from fastppo import ops

EVERYTHING = "log-prob, entropy, gradients"
FLOOR = "matmuls only"
OURS = f"fastppo {fastppo.__version__}"
# Of plain torch with recomputation: the logits of a chunk in fp32.
CHECKPOINT_BYTES = 128 * 2**20
# What TRL's fused head passes to its function (trl/trainer/utils.py, 1.16.0).
TRL_VOCABULARY_CHUNK = 32768


@dataclass(frozen=True)
class Contender:
    """One way to get the loss and its gradients; `run` goes forward and backward."""

    who: str
    gives: str
    objective: str
    run: Callable[[Problem], Outputs]


def run_ours(problem: Problem) -> Outputs:
    """Run `ops.linear_loss` and its backward."""
    targets = (problem.old_logprobs, problem.advantages, problem.weights)
    row_loss = ops.PPOLoss(*targets, clip_low=CLIP, clip_high=CLIP, entropy_coef=ENTROPY_COEF)
    loss = ops.linear_loss(problem.hidden, problem.weight, problem.labels, row_loss)
    loss.backward()
    return Outputs(loss.detach(), row_loss.logprobs, row_loss.entropies)


def run_checkpointed(problem: Problem) -> Outputs:
    """Run plain torch in chunks of rows whose logits are computed again in the backward pass."""
    rows = max(64, CHECKPOINT_BYTES // (4 * len(problem.weight)))
    pieces = [
        checkpoint(head_problem.logprobs_and_entropies, hidden, problem.weight, labels, use_reentrant=False)
        for hidden, labels in zip(problem.hidden.split(rows), problem.labels.split(rows), strict=True)
    ]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return head_problem.descend(problem, PPO, logprobs, entropies)


def _trl_chunked() -> Contender:
    from trl.kernels import ChunkedLogProbFunction

    def run(problem: Problem) -> Outputs:
        logprobs, entropies, *_ = ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.labels, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ("entropy",)
        )
        return head_problem.descend(problem, PPO, logprobs, entropies)

    return Contender(_named("trl", "ChunkedLogProbFunction"), EVERYTHING, PPO, run)


def _trl_selective() -> Contender:
    # The function that TRL's trainers call: the Triton kernel of trl.kernels on CUDA, plain torch elsewhere.
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def run(problem: Problem) -> Outputs:
        shape = (problem.sequences, -1)  # it loops over the first dimension, the sequences in TRL
        logits = F.linear(problem.hidden, problem.weight).unflatten(0, shape)
        logprobs, entropies = selective_log_softmax_and_entropy(logits, problem.labels.view(shape))
        return head_problem.descend(problem, PPO, logprobs.flatten(), entropies.flatten())

    return Contender(_named("trl", "selective_log_softmax_and_entropy"), EVERYTHING, PPO, run)


def _liger_grpo() -> Contender:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def run(problem: Problem) -> Outputs:
        shape = (problem.sequences, -1)
        # One chunk: the tiles inside bound the memory, and more chunks would each fill and add a dW. Not compiled:
        # only the arithmetic on (T,) vectors would be, at the price of a compilation per shape.
        loss_head = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=problem.sequences, epsilon_low=CLIP,
            epsilon_high=CLIP, loss_type="bnpo",
        )  # fmt: skip
        loss, _ = loss_head(
            problem.hidden.unflatten(0, shape), problem.weight, problem.labels.view(shape),
            torch.ones_like(problem.weights).view(shape), problem.advantages.view(shape)[:, 0],
            old_per_token_logps=problem.old_logprobs.view(shape),
        )  # fmt: skip
        loss.backward()
        return Outputs(loss.detach())

    return Contender(_named("liger-kernel", "fused linear GRPO"), "loss without entropy, gradients", PPO_ALONE, run)


def _liger_scaled() -> Contender:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run(problem: Problem) -> Outputs:
        nll, entropies = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden, problem.weight, problem.labels, return_entropy=True
        )
        return head_problem.descend(problem, PPO, -nll, entropies)

    return Contender(_named("liger-kernel", "fused linear scaled CE"), EVERYTHING, PPO, run)


def _torch_cross_entropy() -> Contender:
    from torch.nn import LinearCrossEntropyOptions

    cross_entropy = F.linear_cross_entropy

    def run(problem: Problem) -> Outputs:
        options = LinearCrossEntropyOptions()  # in chunks, the gradient made in the forward pass
        loss = cross_entropy(problem.hidden, problem.weight, problem.labels, options=options)
        loss.backward()
        return Outputs(loss.detach())

    return Contender(_named("torch", "linear_cross_entropy"), "cross-entropy only, gradients", CROSS_ENTROPY, run)


def _named(package: str, what: str) -> str:
    return f"{package} {importlib.metadata.version(package)} {what}"


PEERS: dict[str, Callable[[], Contender]] = {
    "torch.nn.functional.linear_cross_entropy": _torch_cross_entropy,
    "trl.kernels.ChunkedLogProbFunction": _trl_chunked,
    "trl.trainer.utils.selective_log_softmax_and_entropy": _trl_selective,
    "liger_kernel.chunked_loss": _liger_grpo,
    "liger_kernel.ops.fused_linear_scaled_cross_entropy": _liger_scaled,
}


def standing() -> list[Contender]:
    """Return those that are always here, ours first."""
    return [
        Contender(OURS, EVERYTHING, PPO, run_ours),
        Contender(_named("torch", "full logits"), EVERYTHING, PPO, head_problem.plain),
        Contender(_named("torch", "chunks, checkpointed"), EVERYTHING, PPO, run_checkpointed),
    ]


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """Return everybody that can be imported here, ours first, and the reason for everybody else."""
    present, absent = standing(), {}
    for name, make in PEERS.items():
        try:
            present.append(make())
        except Exception as error:  # whatever an import of somebody else's code may raise
            absent[name] = f"{type(error).__name__}: {error}"
    return present, absent


def find(who: str) -> Contender:
    """Return the contender of this name, importing as few libraries as may be; raise LookupError if nobody has it."""
    for contender in standing():
        if contender.who == who:
            return contender
    for make in PEERS.values():
        with suppress(Exception):  # those before it may be missing here
            contender = make()
            if contender.who == who:
                return contender
    raise LookupError(f"nobody is called {who!r} here; there are {[one.who for one in contenders()[0]]}")


def bare_matmuls(problem: Problem, rows: int) -> Callable[[Problem], None]:
    """Return the matmuls that cannot be avoided, `rows` at a time, into buffers that are there already.

    Logits and dH, and dW where the head is trained; the sum of dW over the chunks is not made.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_empty(min(rows, len(hidden)), len(weight))
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if problem.weight.requires_grad else None

    def run(_: Problem) -> None:
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows]
            z = logits[: len(chunk)]
            torch.mm(chunk, weight.t(), out=z)
            torch.mm(z, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                torch.mm(z.t(), chunk, out=d_weight)

    return run
