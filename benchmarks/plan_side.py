"""One run in a process of its own, with its live tensors counted: benchmarks/plan.py starts it.

python -m benchmarks.plan_side CASE, CASE in JSON; it prints one line of JSON. With a limit, exceeding it is an error.
"""

import gc
import json
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.plan_cases import Case
from fastppo.monitor.memory import Growth
from fastppo.planner.live import LiveBytes

ITERATIONS = 2  # the second one has the optimiser's state from its beginning


def configuration(case: Case) -> Any:
    """Return the transformers configuration of the model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**case.model, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def shallow(case: Case) -> Case:
    """Return the case with a model of one layer."""
    depth = "n_layer" if "n_layer" in case.model else "num_hidden_layers"
    return replace(case, model=case.model | {depth: 1})


def settings(case: Case) -> Any:
    """Return the settings of the trainer."""
    from fastppo import PPOConfig

    options = {"mini_batch_size": case.batch, "ppo_epochs": 2, "learning_rate": 1e-5} | case.ppo
    return PPOConfig(batch_size=case.batch, **options)


def predict(case: Case) -> Any:
    """Return the plan of the run, made from its configuration."""
    from fastppo.planner import Work
    from fastppo.planner.network import Weights, build
    from fastppo.trainers.rehearsal import Rehearsal

    config = settings(case)
    weights = Weights(
        bits=case.bits,
        lora_r=case.lora_r,
        lora_targets=case.targets,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return Rehearsal(build(configuration(case), weights, config)).plan(Work(case.prompt, case.response, config))


def make_model(case: Case) -> Any:
    """Return a random model as `fastppo ppo` would load it."""
    import tempfile

    from transformers import AutoModelForCausalLM

    from fastppo import AutoModelForCausalLMWithValueHead

    options: dict[str, Any] = {}
    if case.lora_r is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=case.lora_r, target_modules=case.targets, task_type="CAUSAL_LM")
        options["peft_config"] = lora
    if case.bits is None:
        return AutoModelForCausalLMWithValueHead.from_pretrained(
            AutoModelForCausalLM.from_config(configuration(case)), **options
        )
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(configuration(case)).save_pretrained(directory)
        return AutoModelForCausalLMWithValueHead.from_pretrained(
            directory, load_in_8bit=case.bits == 8, load_in_4bit=case.bits == 4, **options
        )


def run(case: Case, live: LiveBytes) -> dict[str, int]:
    """Run iterations of PPO; return the peaks of live tensors of generation and step."""
    from fastppo import PPOTrainer

    torch.manual_seed(0)
    trainer = PPOTrainer(settings(case), make_model(case))
    generator = torch.Generator().manual_seed(1)
    length = {"max_new_tokens": case.response, "min_new_tokens": case.response, "top_k": 0}
    peaks: dict[str, int] = {}
    for _ in range(ITERATIONS):
        queries = [torch.randint(3, 1000, (case.prompt,), generator=generator) for _ in range(case.batch)]
        live.restart()
        rollout = trainer.generate(queries, return_prompt=False, **length)
        peaks["rollout"] = live.peak
        live.restart()
        trainer.step(queries, rollout, [float(i % 3) for i in range(case.batch)])
        peaks["step"] = live.peak
    return peaks


def main(text: str, limit: str = "") -> None:
    """Measure, predict and print."""
    warnings.simplefilter("ignore")
    case, live = Case(**json.loads(text)), LiveBytes("cpu", int(limit) if limit else None)
    run(shallow(case), LiveBytes("cpu"))  # the libraries' code, lazy parts and scratch must not count as growth
    gc.collect()
    growth = Growth(torch.device("cpu"))
    with live:
        peaks = run(case, live)
    resident = growth.bytes()
    start = time.perf_counter()
    plan = predict(case)
    figures = {
        "predicted_bytes": plan.peak,
        "measured_bytes": max(peaks.values()),
        "resident_bytes": resident,
        "predicted": plan.phases,
        "measured": peaks,
        "plan_seconds": time.perf_counter() - start,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
