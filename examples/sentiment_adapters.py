"""examples/sentiment.py once more, with an adapter as all that is trained, on a base in 8 bits.

    python examples/sentiment_adapters.py [the flags of sentiment.py]

One set of weights is policy, with the adapter on, and reference, with it off. An adapter has few numbers to move and
takes a higher learning rate.
"""

import sys
from typing import Any

import sentiment

OWN = ["--lora_rank=8", "--load_in_8bit=true", "--learning_rate=4e-3", "--output_dir=runs/sentiment_adapters"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return sentiment.main([*OWN, *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
