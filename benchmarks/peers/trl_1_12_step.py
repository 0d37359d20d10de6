"""PPO iterations of TRL 1.12.0 (`trl.experimental.ppo`: four models, policy, reference, value and reward).

A side of benchmarks/step.py, which starts it in .venv-trl112. The trainer has no `step`, only `train`, so the
conversation with the driver hangs on its callback and the stages are told apart by the functions it calls.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import trl
import worker
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Stages(TrainerCallback):
    """Note when the trainer passes from one stage to the next, and answer the driver at the end of each step."""

    def __init__(self, workload: worker.Workload, channel: worker.Channel) -> None:
        self.workload, self.channel = workload, channel
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note the time of the first passage since the last request."""
        self.marks.setdefault(name, time.perf_counter())

    def watch(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Let `owner.name` mark the time `before` it runs or `after` it has run."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.mark(before)
            result = function(*args, **kwargs)
            if after:
                self.mark(after)
            return result

        setattr(owner, name, watched)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first request."""
        self.next_request()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Answer and wait for the next request."""
        end, marks = time.perf_counter(), self.marks
        tokens = self.workload.batch_size * self.workload.response_length
        self.channel.answer(
            generation=marks["generated"] - marks["start"],
            scoring=marks["update"] - marks["generated"],
            update=marks["updated"] - marks["update"],
            total=end - marks["start"],
            tokens=tokens,
        )
        self.next_request()

    def next_request(self) -> None:
        """Block until the driver asks for an iteration, and start its clock."""
        self.channel.wait()
        self.marks.clear()
        self.mark("start")


def make_config(workload: worker.Workload, output_dir: str) -> PPOConfig:
    """Configure fp32 on every position and nothing but the iterations themselves."""
    return PPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=workload.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=worker.PPO_EPOCHS,
        total_episodes=workload.batch_size * workload.max_iterations,
        response_length=workload.response_length,
        learning_rate=worker.LEARNING_RATE,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    """Load the four models and let the trainer run at the driver's pace."""
    workload, channel = worker.parse_workload(), worker.Channel()
    policy, reference = (AutoModelForCausalLM.from_pretrained(workload.model_dir) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(workload.model_dir, num_labels=1) for _ in range(2)
    )
    tokenizer = worker.stub_tokenizer(workload.vocab_size)
    rows = [ids.tolist() for k in range(workload.max_iterations) for ids in workload.prompts(k)]
    dataset = Dataset.from_dict({"input_ids": rows})
    stages = Stages(workload, channel)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = PPOTrainer(
            make_config(workload, output_dir), tokenizer, policy, reference, reward, dataset, value,
            eval_dataset=dataset.select(range(1)), callbacks=[stages],
        )  # fmt: skip
        stages.watch(ppo_trainer, "batch_generation", after="generated")
        # The shuffle of the first epoch opens the update, the first gathered metric closes it.
        stages.watch(np.random, "permutation", before="update")
        stages.watch(trainer.accelerator, "gather_for_metrics", before="updated")
        channel.ready(policy, workload, trl=trl.__version__)
        trainer.train()


if __name__ == "__main__":
    main()
