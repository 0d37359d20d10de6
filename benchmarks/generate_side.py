"""Ours and transformers in benchmarks/generate.py, which starts one contender for each process.

    python -m benchmarks.generate_side CONTENDER WORKLOAD

WORKLOAD is the JSON file that generate.py writes. The first run warms up; its tokens and log-probs are for the gate.
"""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import worker
from benchmarks.recompute import DTYPES

Workload = dict[str, Any]
# Responses, and their log-probs where the contender gives any.
Generated = tuple[list[list[int]], list[list[float]] | None]
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class Ours:
    """The engine, with every prompt in one call or with calls of as many as there are rows."""

    def __init__(self, model: Any, workload: Workload, way: str) -> None:
        from fastppo import Engine

        self.engine = Engine(model, max_rows=workload["rows"])
        self.workload, self.way = workload, way

    def call(self, prompts: list[list[int]], limits: list[int], samples: int) -> Generated:
        """Generate in one call."""
        from fastppo import SamplingConfig

        sampling = SamplingConfig(max_new_tokens=max(limits))
        rollout = self.engine.generate(prompts, sampling, n=samples, max_new_tokens=limits)
        logprobs = [part.tolist() for part in rollout.split(rollout.logprobs)]
        return [response.tolist() for response in rollout.responses], logprobs

    def __call__(self) -> Generated:
        prompts, limits = self.workload["prompts"], self.workload["new_tokens"]
        samples, rows = self.workload["samples"], self.workload["rows"]
        if self.way == "one call":
            return self.call(prompts, limits, samples)
        if self.way == "repeated":
            repeated = [[value for value in values for _ in range(samples)] for values in (prompts, limits)]
            return self.call(*repeated, samples=1)
        responses: list[list[int]] = []
        logprobs: list[list[float]] = []
        for start in range(0, len(prompts), rows):
            wanted = limits[start : start + rows]
            asked = [max(wanted)] * len(wanted) if self.way == "calls to the longest" else wanted
            answer, records = self.call(prompts[start : start + rows], asked, 1)
            responses += [each[:count] for each, count in zip(answer, wanted, strict=True)]
            logprobs += [each[:count] for each, count in zip(records or [], wanted, strict=True)]
        return responses, logprobs


def transformers_generate(model: Any, workload: Workload, is_recording: bool) -> Callable[[], Generated]:
    """Return a run of `model.generate` on the prompts, padded on the left."""
    lengths = [len(prompt) for prompt in workload["prompts"]]
    longest, count = max(lengths), max(workload["new_tokens"])
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in workload["prompts"]])
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    settings = PLAIN | {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}

    def run() -> Generated:
        if not is_recording:
            return model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist(), None
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
        )  # fmt: skip
        tokens = out.sequences[:, longest:]
        steps = [
            logits.float().log_softmax(-1).gather(-1, drawn[:, None])
            for logits, drawn in zip(out.logits, tokens.T, strict=True)
        ]
        return tokens.tolist(), torch.cat(steps, 1).tolist()

    return run


def transformers_batch(model: Any, workload: Workload) -> Callable[[], Generated]:
    """Return a run of transformers' continuous batching, with as few blocks as hold all sequences."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page, count = 128, max(workload["new_tokens"])
    lengths = [len(prompt) for prompt in workload["prompts"]]
    sizes = {
        "page_size": page,
        "num_blocks": sum(-(-(length + count) // page) for length in lengths) + 8,
        "max_batch_tokens": max(256, sum(lengths)),
        "max_requests_per_batch": workload["rows"],
    }
    config = ContinuousBatchingConfig(return_logprobs=True, allow_block_sharing=False, **sizes)
    generation = GenerationConfig(max_new_tokens=count, eos_token_id=-1, pad_token_id=0, **PLAIN)

    def run() -> Generated:
        answer = model.generate_batch(
            workload["prompts"], generation_config=generation, continuous_batching_config=config
        )  # fmt: skip
        outputs = list(answer.values())
        return [each.generated_tokens for each in outputs], [each.logprobs for each in outputs]

    return run


WAYS = {
    "fastppo": "one call",
    "fastppo-calls": "calls",
    "fastppo-longest": "calls to the longest",
    "fastppo-repeated": "repeated",
}
TITLES = {
    "fastppo": "",
    "fastppo-calls": ", calls of as many as rows",
    "fastppo-longest": ", calls of as many as rows, all to the longest",
    "fastppo-repeated": ", each sample a prompt of its own",
    "transformers": " generate",
    "transformers-tokens": " generate, tokens only",
    "transformers-batch": " generate_batch",
}


def contender(name: str, workload: Workload) -> Callable[[], Generated]:
    """Load the model and return what generates once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workload["model_dir"], dtype=DTYPES[workload["dtype"]]).eval()
    if name in WAYS:
        return Ours(model, workload, WAYS[name])
    if name == "transformers-batch":
        return transformers_batch(model, workload)
    return transformers_generate(model, workload, is_recording=name == "transformers")


def main(name: str, path: str) -> None:
    """Answer the driver."""
    channel = worker.Channel()
    warnings.simplefilter("ignore")
    workload = json.loads(Path(path).read_text())
    package = name.partition("-")[0]
    run = contender(name, workload)
    responses, logprobs = run()
    metrics = run.engine.metrics() if isinstance(run, Ours) and hasattr(run.engine, "metrics") else None
    hello = {"who": f"{package} {importlib.import_module(package).__version__}{TITLES[name]}", "metrics": metrics}
    channel.send(hello | {"responses": responses, "logprobs": logprobs})
    while True:
        channel.wait()
        start = time.perf_counter()
        responses, _ = run()
        seconds = time.perf_counter() - start
        tokens = sum(len(each) for each in responses)
        channel.send({"seconds": {"": seconds}, "tokens": tokens, "peak_bytes": worker.peak_bytes()})


if __name__ == "__main__":
    main(*sys.argv[1:])
