#!/bin/sh
# Make the environments of the libraries that benchmarks/step.py, sft.py, head.py and generate.py compare with, next to
# .venv in the repository root, each with the versions it was measured with; run again, it does nothing.
set -eu
cd "$(dirname "$0")/../.."

# Versioned names can be shims for interpreters that are not there, hence the trial run.
if [ -z "${PYTHON:-}" ]; then
    if python3.11 -c '' 2>/dev/null; then PYTHON=python3.11; else PYTHON=python3; fi
fi

make_environment() { # folder, requirements...
    folder=$1
    shift
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$*" ]; then
        echo "$folder is there"
        return
    fi
    echo "making $folder"
    rm -rf "$folder"
    "$PYTHON" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    echo "$*" >"$folder/.installed"
}

# The last release with PPOTrainer.step. numpy, pyarrow and rich: it imports them and breaks on what came later.
make_environment .venv-trl0114 torch==2.13.0 trl==0.11.4 transformers==4.46.3 accelerate==1.1.1 peft==0.13.2 \
    datasets==3.6.0 numpy==1.26.4 'pyarrow<18' rich
# The last release with any PPO.
make_environment .venv-trl112 torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0

# For benchmarks/sft.py.
make_environment .venv-trl116 torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0

# For benchmarks/head.py, which runs in it: this checkout beside the peers. A path file, and the interpreter of .venv,
# so that the extension that is already compiled serves both.
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
make_environment .venv-head torch==2.13.0 trl==1.16.0 liger-kernel==0.8.5 transformers==5.23.0 accelerate==1.15.0 \
    datasets==5.2.0
pwd >"$(.venv-head/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastppo_checkout.pth"

# For benchmarks/generate.py: llama.cpp, compiled for this processor (minutes), and what writes a model for it.
export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}"
make_environment .venv-generate llama-cpp-python==0.3.36 gguf==0.19.0 safetensors numpy
