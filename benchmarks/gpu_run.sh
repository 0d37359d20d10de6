#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under 8 minutes: correctness first, then timings as JSON into $OUT.
# Uses the Python that is there (torch, triton, transformers, peft and pytest must be installed); installs nothing else.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:?set OUT to the folder that takes the results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 setup.py build_ext --inplace >"$OUT/build.log" 2>&1 || echo "no C++ extension: running without it"
status=0
timeout 200 python3 -m pytest -q -m gpu -W default tests 2>&1 | tee "$OUT/tests.log" || status=1
timeout 130 python3 -m benchmarks.head --output "$OUT/head-gpu.json" 2>&1 | tee "$OUT/head.log" || status=1
timeout 40 python3 -m benchmarks.sampling --output "$OUT/sampling-gpu.json" 2>&1 | tee "$OUT/sampling.log" || status=1
timeout 100 python3 -m benchmarks.step --iterations 3 --output "$OUT/step_gpu.json" 2>&1 | tee "$OUT/step.log" || status=1
exit "$status"
