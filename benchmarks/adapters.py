"""Time PPO iterations with LoRA on an 8-bit base: our layers against PEFT's and bitsandbytes' own, under one trainer.

    python -m benchmarks.adapters [--size 15m|110m] [--dtypes fp32 bf16] [--output FILE]

Same weights, prompts and random numbers. First ours is held against a dense model of the weights that the codes stand
for. bitsandbytes' layers compute another model (they round activations, too), whose distance is noted.
"""

import argparse
import copy
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastppo
from benchmarks import measure, recompute
from benchmarks.peers import worker
from benchmarks.side import ROOT
from benchmarks.step import SIZES, write_model
from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, SamplingConfig
from fastppo.models import fusions
from fastppo.models.bnb_linears import Int8Linear

OURS = f"fastppo {fastppo.__version__}"
BARS = {"fp32": 1e-4, "bf16": 0.05}  # the mean difference of recorded log-probs to the dense model's
PROMPT, RESPONSE = 16, 64
NOTES = [
    "an iteration: a rollout and a step of 4 epochs; LoRA of rank 16 on all linear layers, AdamW on the adapters",
    "PEFT + bitsandbytes: the layers' own forward passes, in the same trainer and engine, without the C++ decode step",
    "peak_bytes: high-water mark of the one process in which both run",
]


def make_trainer(folder: str, dtype: str, batch_size: int) -> PPOTrainer:
    """Load the model in 8 bits with adapters that do something."""
    from peft import LoraConfig

    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder,
        load_in_8bit=True,
        dtype=recompute.DTYPES[dtype],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    epochs = {"ppo_epochs": worker.PPO_EPOCHS, "learning_rate": worker.LEARNING_RATE}
    return PPOTrainer(PPOConfig(batch_size=batch_size, mini_batch_size=batch_size, **epochs), model)


def give_back(trainer: PPOTrainer) -> None:
    """Let the layers compute as bitsandbytes and PEFT would."""
    from bitsandbytes.nn import Linear8bitLt

    for module in trainer.model.modules():
        if type(module) is Int8Linear:
            module.__class__ = Linear8bitLt
    found = fusions.find(trainer.model)
    parts, _ = fusions._FOUND[trainer.model]
    fusions._FOUND[trainer.model] = parts, tuple(each for each in found if each.kind != "lora")
    trainer.engine._decode_step = lambda cache: None  # type: ignore[method-assign]


def dense(trainer: PPOTrainer) -> Any:
    """Return the network in fp32 with plain layers of the weights that the codes stand for."""
    network = copy.deepcopy(trainer.model.pretrained_model)
    for name, module in list(network.named_modules()):
        if isinstance(module, Int8Linear):
            codes, scales = module.codes_and_scales()
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data, plain.bias = codes.float() * scales[:, None], module.bias
            network.set_submodule(name, plain)
    return network.float().eval()


def iterate(trainer: PPOTrainer, prompts: list[Tensor]) -> tuple[Any, dict[str, float]]:
    """Run one iteration; return the rollout and the seconds of its parts."""
    start = time.perf_counter()
    sampling = SamplingConfig(max_new_tokens=RESPONSE, stop_ids=())
    rollout = trainer.engine.generate(prompts, sampling)
    middle = time.perf_counter()
    trainer.step(prompts, rollout, [float(len(set(response.tolist()))) / RESPONSE for response in rollout])
    end = time.perf_counter()
    return rollout, {"rollout": middle - start, "step": end - middle, "iteration": end - start}


def run_case(folder: str, dtype: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Check and time both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZES[arguments.size][-1], (arguments.batch_size, PROMPT), generator=generator)
    prompts = list(ids)
    trainers = {who: make_trainer(folder, dtype, arguments.batch_size) for who in (OURS, "PEFT + bitsandbytes")}
    network = dense(trainers[OURS])
    for who, trainer in trainers.items():
        trainer.engine.generate(prompts[:2], max_new_tokens=2)  # the probes want one meaning
        trainer.engine.score(prompts[:2], [[3, 4]] * 2)
        if who != OURS:
            give_back(trainer)
        rollout, _ = iterate(trainer, prompts)
        gaps = recompute.gaps(network, rollout.queries, rollout, rollout.split(rollout.logprobs))
        found["gate"][f"{dtype}: {who}"] = gaps | {"decoder": trainer.engine.metrics()["decoder"]}
        print(f"gate: {dtype}: {who}: {found['gate'][f'{dtype}: {who}']}", file=sys.stderr)
        if who == OURS and not gaps["mean"] <= BARS[dtype]:
            raise SystemExit(f"{dtype}: recorded log-probs are off by {gaps}, over {BARS[dtype]}: not timed")
    load = measure.ForeignLoad([])

    def sample(trainer: PPOTrainer) -> measure.Sample:
        load.restart()
        _, seconds = iterate(trainer, prompts)
        foreign = load.read() if math.isfinite(arguments.foreign_limit) else None
        return measure.Sample(seconds, worker.peak_bytes(), foreign)

    sides = {who: lambda trainer=trainer: sample(trainer) for who, trainer in trainers.items()}
    turns = measure.take_turns(sides, arguments.samples, arguments.foreign_limit)
    found["not_timed"] += measure.not_timed(dtype, turns)
    for who, its in turns.items():
        for row in measure.rows(who, its.samples) if its.samples else ():
            found["rows"].append(row | {"case": f"{dtype}, {row['case']}", "dropped": its.dropped})


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times as long as ours the other takes, for each case."""
    ours = {row["case"]: row["median_s"] for row in rows if row["who"] == OURS}
    return {row["case"]: round(row["median_s"] / ours[row["case"]], 2) for row in rows if row["who"] != OURS}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="15m")
    parser.add_argument("--dtypes", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--foreign-limit", type=float, default=measure.FOREIGN_LIMIT, help="cores others may use")
    parser.add_argument("--quick", action="store_true", help="a tiny model and no guard: shows only that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/adapters-cpu.json)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.foreign_limit, arguments.samples, arguments.size, arguments.batch_size = math.inf, 1, "tiny", 4
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "adapters-cpu.json"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    import tempfile

    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"rows": [], "gate": {}, "not_timed": [], "notes": NOTES}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.size)
        for dtype in arguments.dtypes:
            run_case(folder, dtype, arguments, found)
    found["ratios"] = ratios(found["rows"])
    if arguments.output:
        command = " ".join(["python -m benchmarks.adapters", *argv])
        measure.write_found(arguments.output, command, found, arguments.foreign_limit)
    print(measure.table(found["rows"]))
    print("as long as ours:", found["ratios"])


if __name__ == "__main__":
    main()
