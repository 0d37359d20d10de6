"""PPO iterations of fastppo: a side of benchmarks/step.py, which starts it.

With `--gate`, it times nothing: it compares the log-probs of one batch with what transformers computes for the
same weights and tokens, and prints the largest and the mean difference.
"""

import argparse
import sys
import warnings
from typing import Any

import numpy as np
import torch

import fastppo
from benchmarks import recompute
from benchmarks.peers import worker


def make_trainer(workload: worker.Workload, dtype: str) -> Any:
    """Load the model and make a trainer of the same settings as the peers'."""
    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    config = PPOConfig(
        batch_size=workload.batch_size,
        mini_batch_size=workload.batch_size,
        ppo_epochs=worker.PPO_EPOCHS,
        learning_rate=worker.LEARNING_RATE,
        **({"bf16": True} if dtype == "bf16" else {}),
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(workload.model_dir)
    return PPOTrainer(config, model, tokenizer=worker.stub_tokenizer(workload.vocab_size))


def generation(workload: worker.Workload) -> dict[str, Any]:
    """Spell the sampling of the peers in generation keywords: plain sampling, always the full length."""
    length = workload.response_length
    return {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0, "top_p": 1.0}


def gate(workload: worker.Workload, dtype: str) -> dict[str, float]:
    """Return the largest and the mean difference to transformers of the recorded log-probs and of those of `step`."""
    queries = list(workload.prompts(0))
    trainer = make_trainer(workload, dtype)
    rollout = trainer.generate(queries, return_prompt=False, **generation(workload))
    responses = [torch.as_tensor(response) for response in rollout]
    expected = torch.cat(recompute.logprobs(recompute.load(workload.model_dir), queries, responses)).double().numpy()
    table = np.asarray(trainer.step(queries, responses, workload.scores(0))["objective/logprobs"])
    spans = [
        slice(len(query) - 1, len(query) - 1 + len(response))
        for query, response in zip(queries, responses, strict=True)
    ]
    stepped = np.concatenate([row[span] for row, span in zip(table, spans, strict=True)])
    recorded = rollout.logprobs.double().numpy()
    gaps = np.abs(np.stack([stepped, recorded]) - expected)
    return {"max": float(gaps.max()), "mean": float(gaps.mean(-1).max())}


def main(argv: list[str]) -> None:
    """Answer the driver, or check the log-probs."""
    channel = worker.Channel()
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--gate", action="store_true")
    ours, rest = parser.parse_known_args(argv)
    workload = worker.parse_workload(rest)
    if ours.gate:
        channel.send({"logprob_gaps": gate(workload, ours.dtype)})
        return
    trainer = make_trainer(workload, ours.dtype)
    channel.ready(trainer.model.pretrained_model, workload, fastppo=fastppo.__version__)
    worker.serve_step_api(trainer, workload, channel, generation(workload))


if __name__ == "__main__":
    main(sys.argv[1:])
