"""The three steps of StackLLaMA on one base in 8 bits: fine-tuning, a reward model, and PPO; each is an adapter.

    python examples/stack_llama.py [--model_name_or_path MODEL] [--dataset_name FILE_OR_HUB_ID]

Rows have `question`, `response_j` (preferred) and `response_k`, as `lvwerra/stack-exchange-paired` does. In the last
step one base carries the fine-tuned adapter, which is trained on, a frozen copy of it as the reference, and the reward
model's adapter.
"""

from argparse import Namespace
from itertools import islice
from typing import Any

from peft import LoraConfig
from recipes import ppo_config, read_flags, report, run_settings
from transformers import AutoTokenizer

from fastppo import AutoModelForCausalLMWithValueHead, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

IN_8_BITS = {"load_in_8bit": True}
TRAINING = {"learning_rate": 2e-4, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "save_strategy": "no"}
FLAGS = {
    "model_name_or_path": "huggyllama/llama-7b",
    "dataset_name": "lvwerra/stack-exchange-paired",
    "num_rows": 20_000,
    "held_out": 256,
    "max_length": 1024,
    "max_new_tokens": 128,
    "max_steps": 200,
    "batch_size": 32,
    "train_batch_size": 8,
    "learning_rate": 1.4e-5,
    "init_kl_coef": 0.2,
    "seed": 0,
    "output_dir": "runs/stack_llama",
}


def read_rows(args: Namespace) -> list[dict[str, str]]:
    """Return rows of a question, put as a prompt, and two answers, of which `chosen` was voted above `rejected`."""
    from datasets import load_dataset

    is_file = args.dataset_name.endswith(".jsonl")
    source = {"path": "json", "data_files": args.dataset_name} if is_file else {"path": args.dataset_name}
    rows = islice(load_dataset(**source, split="train", streaming=not is_file), args.num_rows)
    prompts = [(f"Question: {row['question']}\n\nAnswer: ", row) for row in rows]
    return [{"prompt": text, "chosen": row["response_j"], "rejected": row["response_k"]} for text, row in prompts]


def train_adapter(trainer: Any) -> None:
    trainer.train()
    trainer.save_model()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = read_flags(__doc__, arguments, **FLAGS)
    base, sft, reward = args.model_name_or_path, f"{args.output_dir}/sft", f"{args.output_dir}/reward"
    rows, tokenizer = read_rows(args), AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    same = TRAINING | {"per_device_train_batch_size": args.train_batch_size, "max_length": args.max_length}

    settings = SFTConfig(sft, seed=args.seed, packing=True, model_init_kwargs=IN_8_BITS, **same)
    answers = [{"text": row["prompt"] + row["chosen"]} for row in rows]
    train_adapter(SFTTrainer(base, settings, None, answers, tokenizer=tokenizer, peft_config=lora))

    settings = RewardConfig(reward, seed=args.seed, **same)
    whole = {"tokenizer": tokenizer, "peft_config": lora, "model_init_kwargs": IN_8_BITS}
    train_adapter(RewardTrainer(base, settings, None, rows, **whole))

    model = AutoModelForCausalLMWithValueHead.from_pretrained(sft, reward_adapter=reward, **IN_8_BITS)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    PPOTrainer(ppo_config(args, critic_learning_rate=1e-4, vf_coef=0.1), model, tokenizer=tokenizer).train(
        prompts[args.held_out :], model, eval_prompts=prompts[: args.held_out], **run_settings(args)
    )
    return report(args.output_dir)


if __name__ == "__main__":
    main()
