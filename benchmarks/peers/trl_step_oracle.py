"""Record what TRL 0.7.4's `PPOTrainer.step` computes on tiny models, for the tests to compare with.

Run it in an environment of its own (Python 3.11), from the repository root:

    python3.11 -m venv .venv-trl074
    .venv-trl074/bin/pip install torch==2.13.0 trl==0.7.4 transformers==4.35.2 accelerate==0.24.1 peft==0.6.2 \
        "numpy<2" "pyarrow<18" "datasets<3"
    .venv-trl074/bin/python benchmarks/peers/trl_step_oracle.py tests/data/trl_step_oracle.json

The models need no weights file: `fill` below is the formula, `fill` in the JSON its text, so that a test can repeat it.
TRL's defects are recorded as they are: a gap in a response mask counts as time steps of GAE, and a mini-batch skipped
by `ratio_threshold` still takes an optimiser step with zero gradients.
Every case runs twice with another order of the samples; `noise` is the difference rounding alone made in each
parameter. Adam divides by the gradient's size, so where the true gradient is zero (the key biases of GPT-2) what it
makes of the rounding is arbitrary, and a comparison has to leave room for that.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import tokenizers
import torch
import transformers
import trl
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

VOCAB = 23
REFERENCE_PHASE = 0.25
FILL = (
    "names sorted, k = index, i = flat element index (row-major), phase 0 for the policy and reference_phase for the "
    "reference, all in float64, then float32: w = sin(0.37*i*i + 0.7*i + k + phase); norm weights 1 + 0.1*w; "
    "other 1-d tensors 0.05*w; matrices 0.3*w. Names are those of named_parameters without 'pretrained_model.'."
)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_dropout_prob": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "summary_dropout_prob": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}
QUERIES = [[3, 7, 11], [5], [2, 9, 4, 13, 22], [6, 6], [17, 8, 12, 3], [10, 20, 14]]
RESPONSES = [
    [4, 9, 15, 2, 1], [12, 3, 18, 7, 7, 21, 5, 1], [19], [8, 16, 2, 11, 4, 1], [13, 22], [5, 10, 6, 18, 9, 3, 20],
]  # fmt: skip
SCORES = [[1.5, -0.75, 0.3, 2.25, -1.1, 0.6], [-0.4, 3.0, 1.2, -2.5, 0.9, 0.1]]
GAPS = [[1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1], [1], [0, 1, 1, 0, 1, 0], [1, 1], [1, 1, 0, 1, 1, 0, 0]]

# name, model, fields of PPOConfig beside COMMON, and what else the case has: number of steps, masks, the optimiser.
COMMON = {"batch_size": 6, "mini_batch_size": 6, "learning_rate": 1e-3}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("default", "gpt2", {"learning_rate": 1e-5}, {}),
    ("one_epoch", "gpt2", {"ppo_epochs": 1}, {}),
    ("kl", "gpt2", {"kl_penalty": "kl"}, {}),
    ("abs", "gpt2", {"kl_penalty": "abs"}, {}),
    ("mse", "gpt2", {"kl_penalty": "mse"}, {}),
    ("full", "gpt2", {"kl_penalty": "full"}, {}),
    ("whiten_rewards", "gpt2", {"whiten_rewards": True}, {}),
    ("score_scaling", "gpt2", {"use_score_scaling": True}, {"steps": 2}),
    ("score_norm_clip", "gpt2", {"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.5}, {"steps": 2}),
    ("gamma_lam", "gpt2", {"gamma": 0.9, "lam": 0.8}, {}),
    ("gaps", "gpt2", {}, {"masked": True}),
    ("gaps_gamma_whiten", "gpt2", {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True}, {"masked": True}),
    ("clip", "gpt2", {"cliprange": 0.02, "cliprange_value": 0.05, "vf_coef": 0.5, "learning_rate": 5e-3}, {}),
    ("fixed_kl", "gpt2", {"adap_kl_ctrl": False, "init_kl_coef": 0.5, "horizon": 60}, {"steps": 2}),
    ("two_steps", "gpt2", {"target": 0.5, "horizon": 60}, {"steps": 2}),
    ("skip_always", "gpt2", {"ratio_threshold": 0.5}, {}),
    ("skip_some", "gpt2", {"ratio_threshold": 1.05, "learning_rate": 5e-3}, {}),
    ("early_stopping", "gpt2", {"early_stopping": True, "target_kl": 0.0005, "learning_rate": 5e-3}, {}),
    ("sgd", "gpt2", {}, {"optimizer": "sgd", "sgd_lr": 0.1}),
    ("default", "llama", {"learning_rate": 1e-5}, {}),
    ("one_epoch", "llama", {"ppo_epochs": 1}, {}),
    ("full", "llama", {"kl_penalty": "full"}, {}),
    ("score_norm_clip", "llama", {"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.5}, {"steps": 2}),
    ("gaps_gamma_whiten", "llama", {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True}, {"masked": True}),
    ("two_steps", "llama", {"target": 0.5, "horizon": 60}, {"steps": 2}),
    ("sgd", "llama", {}, {"optimizer": "sgd", "sgd_lr": 0.1}),
]
FULL_PARAMETERS = ("v_head.summary.weight", "v_head.summary.bias")


def named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """List the parameters with TRL's checkpoint names, sorted by name."""
    return sorted((name.removeprefix("pretrained_model."), p) for name, p in model.named_parameters())


def fill(model: torch.nn.Module, phase: float) -> None:
    """Set every parameter by the formula `FILL`."""
    for k, (name, parameter) in enumerate(named(model)):
        i = np.arange(parameter.numel(), dtype=np.float64)
        wave = np.sin(0.37 * i * i + 0.7 * i + k + phase)
        if parameter.dim() > 1:
            wave = 0.3 * wave
        else:
            is_norm = name.endswith("weight") and not name.startswith("v_head")
            wave = 1 + 0.1 * wave if is_norm else 0.05 * wave
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(wave.astype(np.float32)).view_as(parameter))


def make_model(kind: str, phase: float) -> torch.nn.Module:
    """Build the tiny model `kind` with a value head and filled weights."""
    if kind == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(**MODELS[kind]))
    else:
        base = LlamaForCausalLM(LlamaConfig(**MODELS[kind]))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    fill(model, phase)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that is only ever asked to pad, on the right, with token 0."""
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", padding_side="right"
    )


def at_responses(table: Any) -> list[float]:
    """Pick the response positions out of a padded (B, L-1) table, sample after sample."""
    picked: list[float] = []
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        start = len(query) - 1
        picked += np.asarray(table[row], dtype=np.float64)[start : start + len(response)].tolist()
    return picked


def spy(trainer: PPOTrainer, name: str, record: Callable[[Any], None]) -> None:
    """Let `record` see each result of the trainer's method `name`."""
    method = getattr(trainer, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        record(result)
        return result

    setattr(trainer, name, wrapper)


def watched_step(trainer: PPOTrainer, scores: list[float], masked: bool) -> dict[str, Any]:
    """Run one `step` and return its stats and intermediate values, arrays at response positions in sample order."""
    seen: dict[str, Any] = {"orders": [], "epochs": []}
    spies = ("compute_rewards", "compute_advantages", "train_minibatch")
    spy(trainer, "compute_rewards", lambda r: seen.update(rewards=r[0], non_score_rewards=r[1]))
    spy(trainer, "compute_advantages", lambda r: seen.update(values=r[0], advantages=r[1], returns=r[2]))
    spy(trainer, "train_minibatch", lambda r: seen["epochs"].append(r))
    permutation = np.random.permutation
    np.random.permutation = lambda n: seen["orders"].append(permutation(n)) or seen["orders"][-1]
    try:
        stats = trainer.step(
            [torch.tensor(q) for q in QUERIES],
            [torch.tensor(r) for r in RESPONSES],
            [torch.tensor(s) for s in scores],
            [torch.tensor(m) for m in GAPS] if masked else None,
        )
    finally:
        np.random.permutation = permutation
        for name in spies:
            delattr(trainer, name)
    return describe(stats, seen) | {"scores": scores, "kl_coef_after": float(trainer.kl_ctl.value)}


def describe(stats: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """Turn TRL's stats and the spied values into JSON, ratios un-permuted to (epochs, response tokens)."""
    out: dict[str, Any] = {key: at_responses(seen[key]) for key in ("rewards", "non_score_rewards", "values")}
    out |= {key: at_responses(seen[key]) for key in ("advantages", "returns")}
    out["stats"] = {}
    for key, value in stats.items():
        if key.startswith("time/") or key in ("ppo/policy/advantages", "ppo/policy/ratio"):
            continue
        if key in ("objective/logprobs", "objective/ref_logprobs"):
            out["stats"][key] = at_responses(value)
        else:
            out["stats"][key] = np.asarray(value).tolist()
    epochs = len(seen["epochs"])
    out["stats"]["ppo/policy/ratio"] = unpermute(stats["ppo/policy/ratio"], seen["orders"][:epochs])
    scalars = ("loss/policy", "loss/value", "policy/approxkl", "policy/policykl", "policy/clipfrac", "val/clipfrac")
    out["epochs"] = {key: [float(s[key]) for s in seen["epochs"]] for key in scalars}
    return out


def unpermute(flat: Any, orders: list[np.ndarray]) -> list[list[float]]:
    """Undo each epoch's shuffle of the samples in TRL's flattened (epochs * B * (L-1)) array."""
    epochs = np.asarray(flat).reshape(len(orders), len(QUERIES), -1)
    rows = []
    for order, table in zip(orders, epochs, strict=True):
        restored = np.empty_like(table)
        restored[order] = table
        rows.append(at_responses(restored))
    return rows


def run_case(kind: str, fields: dict[str, Any], extra: dict[str, Any], seed: int) -> tuple[list[Any], Any]:
    """Run the steps of one case; return what was recorded and the trained model."""
    model, reference = make_model(kind, 0.0), make_model(kind, REFERENCE_PHASE)
    optimizer = torch.optim.SGD(model.parameters(), lr=extra["sgd_lr"]) if "optimizer" in extra else None
    trainer = PPOTrainer(PPOConfig(**(COMMON | fields), seed=seed), model, reference, make_tokenizer(), None, optimizer)
    steps = []
    for index in range(extra.get("steps", 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = watched_step(trainer, SCORES[index], extra.get("masked", False))
        step["skipped"] = sum("exceeds threshold" in str(w.message) for w in caught)
        steps.append(step)
    return steps, model


def digest(model: torch.nn.Module, twin: torch.nn.Module) -> dict[str, Any]:
    """Summarise the parameters, with the largest difference to a run that only shuffled otherwise."""
    out = {}
    for (name, parameter), (_, other) in zip(named(model), named(twin), strict=True):
        values = parameter.detach().double().flatten()
        out[name] = {
            "sum": values.sum().item(),
            "abs_sum": values.abs().sum().item(),
            "first": (values if name in FULL_PARAMETERS else values[:8]).tolist(),
            "noise": (parameter - other).abs().max().item(),
        }
    return out


def rounded(value: Any) -> Any:
    """Keep eight significant digits, enough for float32."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main(path: str) -> None:
    """Run every case and write the JSON file."""
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (trl, transformers, torch, accelerate, np, tokenizers)}
    note = {
        "what": "inputs and outputs of PPOTrainer.step of TRL 0.7.4 (CPU, fp32); benchmarks/peers/trl_step_oracle.py",
        "versions": versions,
        "arrays": "per-token lists hold the response positions only, sample after sample, masked ones included; "
        "ppo/policy/ratio is one such list per epoch; std_scores etc. as TRL returned them",
        "noise": "largest difference in the parameter between two runs that differ in the order of the samples only; "
        "the key third of GPT-2's c_attn.bias has no gradient but rounding (it does not change the output either)",
    }
    document: dict[str, Any] = {"note": note, "fill": FILL, "reference_phase": REFERENCE_PHASE, "models": MODELS}
    document["parameters"] = {kind: [name for name, _ in named(make_model(kind, 0.0))] for kind in MODELS}
    document["inputs"] = {"queries": QUERIES, "responses": RESPONSES, "gap_masks": GAPS, "pad_token_id": 0}
    document["cases"] = []
    for name, kind, fields, extra in CASES:
        steps, model = run_case(kind, fields, extra, seed=0)
        _, twin = run_case(kind, fields, extra, seed=1)
        case = {"name": name, "model": kind, "config": COMMON | fields, "masked": False} | extra
        document["cases"].append(case | {"steps": steps, "parameters": digest(model, twin)})
        print(name, kind, f"kl {steps[0]['stats']['objective/kl']:.4f}", "skipped", [s["skipped"] for s in steps])
    Path(path).write_text(json.dumps(rounded(document), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
