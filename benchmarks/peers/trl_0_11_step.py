"""PPO iterations of TRL 0.11.4 (`PPOTrainer.step`: policy with a value head, a reference copy, scores given).

A side of benchmarks/step.py, which starts it in .venv-trl0114.
"""

import warnings

import trl
import worker
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    """Load the model and answer the driver."""
    workload, channel = worker.parse_workload(), worker.Channel()
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(workload.model_dir)
    config = PPOConfig(
        batch_size=workload.batch_size,
        mini_batch_size=workload.batch_size,
        ppo_epochs=worker.PPO_EPOCHS,
        learning_rate=worker.LEARNING_RATE,
    )
    tokenizer = worker.stub_tokenizer(workload.vocab_size)
    trainer = PPOTrainer(config, model, None, tokenizer)
    generation = {
        "batch_size": workload.batch_size,
        "max_new_tokens": workload.response_length,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": worker.PAD,
        # It would cut at the tokenizer's end token, which the model does not stop at: less work than the others do.
        "remove_padding": False,
    }
    channel.ready(model.pretrained_model, workload, trl=trl.__version__)
    worker.serve_step_api(trainer, workload, channel, generation)


if __name__ == "__main__":
    main()
