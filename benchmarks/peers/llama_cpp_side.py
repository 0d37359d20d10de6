"""llama.cpp in benchmarks/generate.py, which starts it in .venv-generate: one decode call for all sequences a step.

    python llama_cpp_side.py llama.cpp|llama.cpp-numpy WORKLOAD

The first draws with its own sampler, the second with numpy from its logits and gives log-probs too. The key-value
cache is llama.cpp's default, fp16. The first run warms up; its log-probs, for the gate, come from the logits in both.
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import worker
from gguf_model import write_gguf

Drawn = tuple[np.ndarray, np.ndarray | None]  # tokens and log-probs, (N,) each


def load(workload: dict[str, Any]) -> Any:
    """Convert the model and load it; return a context with room for all sequences."""
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(Path(workload["model_dir"]), path, workload["dtype"])
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp did not load the model that was written for it")
    lengths = [len(prompt) for prompt in workload["prompts"]]
    tokens = max(256, sum(lengths))
    room = max(lengths) + max(workload["new_tokens"])
    settings = llama_cpp.llama_context_default_params()
    settings.n_seq_max = len(lengths)
    settings.n_ctx = -(-room // 256) * 256 * len(lengths)
    settings.n_batch = settings.n_ubatch = tokens
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp did not make a context of this size")
    return context


class Generator:
    """Generates one response for each prompt of a workload, all of one length."""

    def __init__(self, workload: dict[str, Any], is_own_sampler: bool) -> None:
        self.context = load(workload)
        self.prompts, self.count = workload["prompts"], max(workload["new_tokens"])
        self.vocabulary = workload["vocabulary"]
        self.batch = llama_cpp.llama_batch_init(max(256, sum(map(len, self.prompts))), 0, 1)
        self.sampler = None
        if is_own_sampler:
            self.sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_dist(0))
        self.random = np.random.default_rng(0)

    def decode(self, tokens: list[int], positions: list[int], rows: list[int], wanted: list[int]) -> None:
        """Run the model over tokens of the sequences `rows`; give logits for the entries `wanted`."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        wants = np.zeros(len(tokens), np.int8)
        wants[wanted] = 1
        for target, values in ((batch.token, tokens), (batch.pos, positions)):
            numbers = np.array(values, np.int32)  # named, for an address does not keep the array that it is of
            ctypes.memmove(target, numbers.ctypes.data, numbers.nbytes)
        ctypes.memmove(batch.logits, wants.ctypes.data, len(tokens))
        for index, row in enumerate(rows):
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def draw(self, wanted: list[int], is_recording: bool) -> Drawn:
        """Draw a token from the logits of each wanted entry."""
        rows = len(wanted)
        if self.sampler is not None and not is_recording:
            drawn = [llama_cpp.llama_sampler_sample(self.sampler, self.context, entry) for entry in wanted]
            return np.array(drawn), None
        pointer = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, (rows, self.vocabulary))
        logits = logits - logits.max(-1, keepdims=True)
        above = np.exp(logits).cumsum(-1)
        if self.sampler is not None:
            tokens = np.array([llama_cpp.llama_sampler_sample(self.sampler, self.context, entry) for entry in wanted])
        else:
            marks = self.random.random(rows) * above[:, -1]
            found = [np.searchsorted(line, mark, "right") for line, mark in zip(above, marks, strict=True)]
            tokens = np.minimum(found, self.vocabulary - 1)
        return tokens, logits[np.arange(rows), tokens] - np.log(above[:, -1])

    def run(self, is_recording: bool) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate; return the responses, and their log-probs if they are recorded."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        lengths = [len(prompt) for prompt in self.prompts]
        rows = list(range(len(lengths)))
        ends = list(np.cumsum(lengths) - 1)
        owners = [row for row in rows for _ in range(lengths[row])]
        positions = [position for length in lengths for position in range(length)]
        self.decode([token for prompt in self.prompts for token in prompt], positions, owners, ends)
        steps = [self.draw(ends, is_recording)]
        for step in range(self.count - 1):
            self.decode(steps[-1][0].tolist(), [length + step for length in lengths], rows, rows)
            steps.append(self.draw(rows, is_recording))
        tokens = np.stack([tokens for tokens, _ in steps], 1).tolist()
        if not is_recording:
            return tokens, None
        return tokens, np.stack([logprobs for _, logprobs in steps], 1).tolist()


def main(name: str, path: str) -> None:
    """Answer the driver."""
    channel = worker.Channel()
    workload = json.loads(Path(path).read_text())
    is_own = name == "llama.cpp"
    generator = Generator(workload, is_own)
    responses, logprobs = generator.run(is_recording=True)
    who = f"llama-cpp-python {llama_cpp.__version__}, " + ("own sampler, tokens only" if is_own else "drawn with numpy")
    channel.send({"who": who, "metrics": None, "responses": responses, "logprobs": logprobs})
    while True:
        channel.wait()
        start = time.perf_counter()
        responses, _ = generator.run(is_recording=not is_own)
        seconds = time.perf_counter() - start
        tokens = sum(len(each) for each in responses)
        channel.send({"seconds": {"": seconds}, "tokens": tokens, "peak_bytes": worker.peak_bytes()})


if __name__ == "__main__":
    main(*sys.argv[1:])
