"""Teach a small model, made on the spot, to add by asking a calculator: PPO through a text environment.

It has first seen demonstrations of which most are bad: guesses without the tool, and the wrong question."""

import argparse
import random
import tempfile

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer, TextEnvironment
from fastppo.environments.tools import Calculator

TAGS = ["<pad>", "</s>", "<request>", "<Calculator>", "<call>", "<response>", "<submit>"]


def right(task: str) -> int:
    return sum(int(number) for number in task.rstrip("=").split("+"))


def demonstration(draw: random.Random, task: str) -> str:
    """What is shown for `12+30=`: a guess, the wrong question, or, one time in five, the right one."""
    first, second = task.rstrip("=").split("+")
    asked = draw.choices(["", f"{first}+{first}", f"{second}+{second}", task[:-1]], [2, 1, 1, 1])[0]
    called = f"<request><Calculator>{asked}<call>{right(asked)}<response>{right(asked)}<submit>" if asked else ""
    return called or f"{draw.randint(20, 198)}<submit>"


def reward(texts: list[str], tasks: list[str]) -> list[float]:
    return [float(text == f"{right(task)}<submit>") for text, task in zip(texts, tasks, strict=True)]


def fine_tuned(rows: list[dict[str, str]]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A new model of some 80,000 weights that writes as the rows do, and its tokenizer of single letters and tags."""
    words = {word: i for i, word in enumerate([*TAGS, *"0123456789+=?"])}
    core = Tokenizer(models.WordLevel(words, unk_token="?"))
    core.add_tokens(TAGS)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="?")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"vocab_size": len(words), "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1}
    network = LlamaForCausalLM(LlamaConfig(**size, bos_token_id=None))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, per_device_train_batch_size=32, num_train_epochs=1, learning_rate=3e-3, report_to=[])
        SFTTrainer(network, args, train_dataset=rows, processing_class=tokenizer).train()
    return network, tokenizer


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"demonstrations": 12000, "batch_size": 64, "max_steps": 50, "held_out": 200, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    tasks = draw.sample([f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)], 8100)
    held_out, tasks = tasks[: args.held_out], tasks[args.held_out :]
    shown = draw.choices(tasks, k=args.demonstrations)
    network, tokenizer = fine_tuned([{"prompt": task, "completion": demonstration(draw, task)} for task in shown])
    size = {"batch_size": args.batch_size, "mini_batch_size": args.batch_size}
    rates = {"learning_rate": 5e-4, "critic_learning_rate": 1e-2, "lr_scheduler_type": "linear", "init_kl_coef": 0.01}
    config = PPOConfig(seed=args.seed, steps=args.max_steps * args.batch_size, **size, **rates)
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(network), tokenizer=tokenizer)
    env = TextEnvironment(trainer, None, [Calculator()], reward, max_turns=2, generation_kwargs={"max_new_tokens": 16})
    before = sum(env.run(held_out, tasks=held_out)[3]) / len(held_out)
    for step in range(args.max_steps):
        batch = draw.choices(tasks, k=args.batch_size)
        queries, responses, masks, rewards, _ = env.run(batch, tasks=batch)
        trainer.step(queries, responses, rewards, response_masks=masks)
        print(f"step {step}: right {sum(rewards) / len(rewards):.2f}")
    *_, rewards, histories = env.run(held_out, tasks=held_out)
    histories[0].show_text(show_legend=True)
    print(f"right results on held-out sums: {before:.2f} -> {(after := sum(rewards) / len(rewards)):.2f}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
