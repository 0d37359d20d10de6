"""PPO iterations of fastppo: a side of benchmarks/step.py, which starts it.

With `--gate` first, it times nothing: it compares the log-probs of one batch with what transformers computes for the
same weights and tokens, and prints the largest difference.
"""

import sys
import warnings
from typing import Any

import numpy as np
import torch

import fastppo
from benchmarks.peers import worker


def make_trainer(workload: worker.Workload) -> Any:
    """Load the model and make a trainer of the same settings as the peers'."""
    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    config = PPOConfig(
        batch_size=workload.batch_size,
        mini_batch_size=workload.batch_size,
        ppo_epochs=worker.PPO_EPOCHS,
        learning_rate=worker.LEARNING_RATE,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(workload.model_dir)
    return PPOTrainer(config, model, tokenizer=worker.stub_tokenizer(workload.vocab_size))


def generation(workload: worker.Workload) -> dict[str, Any]:
    """Spell the sampling of the peers in generation keywords: plain sampling, always the full length."""
    length = workload.response_length
    return {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0, "top_p": 1.0}


@torch.no_grad()
def expected_logprobs(workload: worker.Workload, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> Any:
    """Compute the response log-probs with plain transformers, sample by sample, as one flat array."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workload.model_dir).eval()
    pieces = []
    for query, response in zip(queries, responses, strict=True):
        ids = torch.cat([query, response])[None]
        logprobs = model(input_ids=ids).logits[0, len(query) - 1 : -1].float().log_softmax(-1)
        pieces.append(logprobs.gather(-1, response[:, None])[:, 0])
    return torch.cat(pieces).double().numpy()


def gate(workload: worker.Workload) -> float:
    """Return the largest difference to transformers, of the sampler's records and of `step` on plain lists."""
    queries = list(workload.prompts(0))
    trainer = make_trainer(workload)
    rollout = trainer.generate(queries, return_prompt=False, **generation(workload))
    responses = [torch.as_tensor(response) for response in rollout]
    expected = expected_logprobs(workload, queries, responses)
    table = np.asarray(trainer.step(queries, responses, workload.scores(0))["objective/logprobs"])
    spans = [
        slice(len(query) - 1, len(query) - 1 + len(response))
        for query, response in zip(queries, responses, strict=True)
    ]
    stepped = np.concatenate([row[span] for row, span in zip(table, spans, strict=True)])
    recorded = rollout.logprobs.double().numpy()
    return float(max(np.abs(stepped - expected).max(), np.abs(recorded - expected).max()))


def main(argv: list[str]) -> None:
    """Answer the driver, or check the log-probs."""
    channel = worker.Channel()
    warnings.simplefilter("ignore")
    if argv[0] == "--gate":
        channel.send({"logprob_gap": gate(worker.parse_workload(argv[1:]))})
        return
    workload = worker.parse_workload(argv)
    trainer = make_trainer(workload)
    channel.ready(trainer.model.pretrained_model, workload, fastppo=fastppo.__version__)
    worker.serve_step_api(trainer, workload, channel, generation(workload))


if __name__ == "__main__":
    main(sys.argv[1:])
