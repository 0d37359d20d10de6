"""Supervised fine-tuning steps of TRL 1.16: a side of benchmarks/sft.py, which starts it in .venv-trl116."""

import tempfile

import sft_worker
import trl
import worker
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Load the model and answer the driver."""
    channel = worker.Channel()
    workload, is_gate = sft_worker.parse_workload()
    model = sft_worker.load(workload)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(**sft_worker.settings(workload, folder), max_length=None),
            train_dataset=Dataset.from_list(workload.rows()),
            processing_class=worker.stub_tokenizer(workload.vocab_size),
        )
        sft_worker.serve(trainer, workload, channel, is_gate, trl=trl.__version__)


if __name__ == "__main__":
    main()
