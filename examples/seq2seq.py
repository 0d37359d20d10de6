"""Translation or summarisation with a T5: the encoder reads the prompt, the decoder writes what is scored.

    python examples/seq2seq.py [--task translation|summary] [--model_name_or_path google-t5/t5-small]

Without a model a small T5 is made on the spot, for a task of the same kind that is made by rule: numbers into words, or
marked words copied. It has a few supervised steps and goes on with chrF or ROUGE-L as its reward.
"""

from typing import Any

import torch
from recipes import ppo_config, read_flags, report, run_settings
from seq2seq_data import made, named

from fastppo import PPOTrainer
from fastppo.environments.tasks import Summary, Translation

FLAGS = {
    "task": "translation",
    "model_name_or_path": None,
    "num_rows": 4000,
    "supervised_steps": 80,
    "held_out": 200,
    "max_new_tokens": 8,
    "max_steps": 150,
    "batch_size": 128,
    "learning_rate": 2e-3,
    "init_kl_coef": 0.01,
    "seed": 0,
    "output_dir": "runs/seq2seq",
}
TASKS = {"translation": Translation(template="{text}"), "summary": Summary(words=2, template="{text}")}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **FLAGS)
    torch.manual_seed(args.seed)
    model, tokenizer, rows = (named if args.model_name_or_path else made)(args)
    config = ppo_config(args, ppo_epochs=4, critic_learning_rate=5e-3, vf_coef=0.1, entropy_coef=0.02)
    PPOTrainer(config, model, tokenizer=tokenizer).train(
        rows[args.held_out :], TASKS[args.task], eval_prompts=rows[: args.held_out], **run_settings(args)
    )
    return report(args.output_dir)


if __name__ == "__main__":
    main()
