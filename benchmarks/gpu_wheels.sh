#!/usr/bin/env bash
# Collect the wheels that a machine with torch and transformers may lack for benchmarks/gpu_check.sh, to carry them
# there: Linux, x86-64, Python 3.12, about 50 MB.
#
#   bash benchmarks/gpu_wheels.sh [FOLDER]      default: benchmarks/.wheels, which git ignores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-benchmarks/.wheels}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python

mkdir -p "$folder"
# Only these: what they need besides is what transformers needs, too. The ranges are those of pyproject.toml.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform any \
    "bitsandbytes>=0.50" "zstandard>=0.23" "loguru>=0.7" "netifaces-plus>=0.12" "httpx2>=2" httpcore2 truststore
du -sh "$folder"
ls "$folder"
