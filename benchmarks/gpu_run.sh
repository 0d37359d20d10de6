#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most 8 minutes: correctness first, then timings as JSON into $OUT.
# Each part has its limit; one that fails or is stopped makes the exit status 1 and keeps none of the others back.
# Uses the Python that is there (torch, triton, transformers, peft and pytest must be installed); installs nothing else.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:?set OUT to the folder that takes the results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
if ! timeout 60 python3 setup.py build_ext --inplace >"$OUT/build.log" 2>&1; then
  echo "the build failed, see build.log: what follows may run without the C++ extension"
  status=1
fi
timeout 150 python3 -m pytest -q -m gpu -W default tests 2>&1 | tee "$OUT/tests.log" || status=1
timeout 90 python3 -m benchmarks.head --output "$OUT/head-gpu.json" 2>&1 | tee "$OUT/head.log" || status=1
timeout 40 python3 -m benchmarks.sampling --samples 3 --dtypes bf16 --output "$OUT/sampling-gpu.json" 2>&1 | tee "$OUT/sampling.log" || status=1
timeout 100 python3 -m benchmarks.rollout --rows 1 32 128 --new 128 --samples 1 --output "$OUT/rollout-gpu.json" 2>&1 | tee "$OUT/rollout.log" || status=1
timeout 40 python3 -m benchmarks.step --iterations 3 --output "$OUT/step_gpu.json" 2>&1 | tee "$OUT/step.log" || status=1
exit "$status"
