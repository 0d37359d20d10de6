"""The operations of `reference.py` and its neighbours, by the same names, each on the fastest backend for its tensors.

Usable without the trainer, by other trainers too. `linear_logprobs`, `linear_loss` and `linear_kl` go from hidden
states to log-probs, a loss with its gradients, or an exact KL, and never hold [rows x vocabulary].
"""

from fastppo.ops.backends import backend, use_backend
from fastppo.ops.chunks import LogitBuffer, chunk_rows
from fastppo.ops.flat import checksum, gae, pack
from fastppo.ops.four_bits import four_bit_linear
from fastppo.ops.fused import gated_activation, rms_norm, rotary
from fastppo.ops.logprobs import linear_kl, linear_logprobs
from fastppo.ops.loss import linear_loss
from fastppo.ops.matmul import small_linear
from fastppo.ops.ppo_loss import PPOLoss, ppo_loss
from fastppo.ops.quantised import int8_linear
from fastppo.ops.sampling import sample_tokens
from fastppo.reference import clipped_policy_loss, clipped_value_loss, kl_penalty, scaled_logits, whiten
from fastppo.reference_sampling import uniforms

__all__ = [
    "LogitBuffer",
    "PPOLoss",
    "backend",
    "checksum",
    "chunk_rows",
    "clipped_policy_loss",
    "clipped_value_loss",
    "four_bit_linear",
    "gae",
    "gated_activation",
    "int8_linear",
    "kl_penalty",
    "linear_kl",
    "linear_logprobs",
    "linear_loss",
    "pack",
    "ppo_loss",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "scaled_logits",
    "small_linear",
    "uniforms",
    "use_backend",
    "whiten",
]
