"""Time rollouts of a Llama with random weights on a GPU, with CUDA graphs and without, against the bandwidth roofline.

    python -m benchmarks.rollout [--model 8b] [--rows 1 32 128] [--prompt 512] [--new 512] [--lora 16] [--output FILE]

First both ways must give the same log-probs, close to those of the model's own forward pass. The floor of a step is
the bytes of all weights and of the keys and values of every context over the rate of a large copy on this device.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from fastppo import Engine, SamplingConfig
from fastppo.engine import engine as engine_module

ROOT = Path(__file__).resolve().parent.parent
# hidden, layers, heads, key-value heads, intermediate, vocabulary: Llama 3.1 8B, SmolLM 1.7B, and one that only runs.
MODELS = {
    "8b": (4096, 32, 32, 8, 14336, 128_256),
    "1.7b": (2048, 24, 32, 32, 8192, 49_152),
    "tiny": (32, 2, 4, 2, 64, 211),
}
WAYS = ("graphs", "launches, a look at every token")
# Mean difference of a recorded log-prob to the model's own forward pass, which rounds at other places in bf16.
BAR = 0.05
GATED = 4  # rows


def build(name: str, device: str, lora: int) -> Any:
    """Return the model in bf16, fp32 on a CPU, with random weights and, with a rank, adapters on all linear layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, heads, kv_heads, intermediate, vocabulary = MODELS[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else None)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


class Way:
    """An engine that decodes one way."""

    def __init__(self, model: Any, rows: int, way: str) -> None:
        self.engine, self.has_graphs = Engine(model, max_rows=rows), way == WAYS[0]

    def run(self, prompts: list[Tensor], new_tokens: int) -> Any:
        """Generate, always the same requests."""
        device, patched = prompts[0].device.type, engine_module.STEPS_PER_CHECK
        step = self.engine._decode_step
        try:
            if not self.has_graphs:
                engine_module.STEPS_PER_CHECK = {}
                self.engine._decode_step = lambda cache: None  # type: ignore[method-assign]
            self.engine.num_requests = 0
            sampling = SamplingConfig(max_new_tokens=new_tokens, stop_ids=())
            rollout = self.engine.generate(prompts, sampling)
            if device == "cuda":
                torch.cuda.synchronize()
            return rollout
        finally:
            engine_module.STEPS_PER_CHECK = patched
            self.engine._decode_step = step  # type: ignore[method-assign]


@torch.no_grad()
def gap(model: Any, rollout: Any) -> float:
    """Return the mean difference of recorded log-probs to those of the model's own forward pass."""
    gaps = []
    for query, response, recorded in list(zip(rollout.queries, rollout, rollout.split(rollout.logprobs), strict=True))[
        :GATED
    ]:
        logits = model(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        gaps.append((recorded - expected).abs())
    return float(torch.cat(gaps).mean())


def bandwidth(device: str, size: int) -> float:
    """Return bytes read and written per second by the fastest of some copies of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, fastest = torch.empty_like(source), float("inf")
    for _ in range(20):
        fastest = min(fastest, timed(lambda: target.copy_(source), device))
    return 2 * size / fastest


def timed(run: Callable[[], object], device: str) -> float:
    """Return the seconds of a run, to the end of all that it started."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def floor_seconds(model: Any, name: str, rows: int, prompt: int, new_tokens: int, rate: float) -> float:
    """Return the least seconds of the decode steps: what they must read over the rate."""
    hidden, layers, heads, kv_heads, *_ = MODELS[name]
    embedding = model.get_input_embeddings().weight.nbytes  # of which a step reads a few rows
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    element = model.get_input_embeddings().weight.element_size()
    a_token = 2 * layers * kv_heads * (hidden // heads) * element
    steps = new_tokens - 1
    contexts = rows * sum(prompt + 1 + step for step in range(steps))
    return (weights * steps + a_token * contexts) / rate


def check(model: Any, prompts: list[Tensor], ways: dict[str, Way], new_tokens: int) -> dict[str, Any]:
    """Warm up, compare, and return what was found. Exits if the ways differ or the log-probs are wrong."""
    rollouts = {name: way.run(prompts, new_tokens) for name, way in ways.items()}
    one, two = rollouts.values()
    found = {
        "logprob_gap": gap(model, one),
        "same_tokens": bool(torch.equal(one.tokens, two.tokens)),
        "same_logprobs": bool(torch.equal(one.logprobs, two.logprobs)),
        "metrics": {name: way.engine.metrics() for name, way in ways.items()},
    }
    print(f"gate: {len(prompts)} rows: {found}", file=sys.stderr)
    if not found["logprob_gap"] <= BAR:
        raise SystemExit(f"recorded log-probs are off by {found['logprob_gap']:.3g} in the mean, over {BAR}: not timed")
    return found


def run_case(model: Any, rows: int, rate: float, arguments: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Check and time both ways with so many rows."""
    device = arguments.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, MODELS[arguments.model][-1], (rows, arguments.prompt), generator=generator)
    prompts, ways = list(ids.to(device)), {name: Way(model, rows, name) for name in WAYS}
    gate = check(model, prompts, ways, min(arguments.new, 40))
    result = []

    def sample(way: Way) -> measure.Sample:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: way.run(prompts, arguments.new), device)
        decoding = seconds - timed(lambda: way.run(prompts, 1), device)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return measure.Sample({"rollout": seconds, "decode": decoding}, peak, None)

    takers = {name: lambda way=way: sample(way) for name, way in ways.items()}
    floor = floor_seconds(model, arguments.model, rows, arguments.prompt, arguments.new, rate)
    for who, its in measure.take_turns(takers, arguments.samples, float("inf")).items():
        for row in measure.rows(f"fastppo, {who}", its.samples):
            row["tokens_per_s"] = round(rows * arguments.new / row["median_s"], 1)
            row["rows"] = rows
            if row["case"] == "decode":
                row["roofline_share"] = round(floor / row["median_s"], 4)
            row["case"] = f"{rows} x {arguments.prompt} + {arguments.new}, {row['case']}"
            result.append(row)
    return result, gate


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of each response")
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters; 0 for none")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON, which after every case holds what there is by then."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    model = build(arguments.model, arguments.device, arguments.lora)
    rate = bandwidth(arguments.device, 2**30 if arguments.device == "cuda" else 2**24)
    rows: list[dict[str, Any]] = []
    gates: dict[str, Any] = {}
    for count in arguments.rows:
        its, gates[str(count)] = run_case(model, count, rate, arguments)
        rows += its
        if arguments.output:
            command = " ".join(["python -m benchmarks.rollout", *argv])
            measure.write_result(arguments.output, command, rows, gate=gates, bytes_per_s=rate)
    print(measure.table(rows))
    for row in rows:
        if "roofline_share" in row:
            print(f"{row['case']}, {row['who']}: {row['roofline_share']:.2f} of the roofline")


if __name__ == "__main__":
    main()
