"""Supervised fine-tuning steps of fastppo: a side of benchmarks/sft.py, which starts it."""

import sys
import tempfile
from pathlib import Path

# The peers run as scripts in their own folder, and what they share with this side lies there.
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import sft_worker
import worker

import fastppo
from fastppo import SFTConfig, SFTTrainer


def main() -> None:
    """Load the model and answer the driver."""
    channel = worker.Channel()
    workload, is_gate = sft_worker.parse_workload()
    model = sft_worker.load(workload)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(**sft_worker.settings(workload, folder)),
            train_dataset=workload.rows(),
            processing_class=worker.stub_tokenizer(workload.vocab_size),
        )
        sft_worker.serve(trainer, workload, channel, is_gate, fastppo=fastppo.__version__)


if __name__ == "__main__":
    main()
