#!/usr/bin/env bash
# Fetch unified_chip2.jsonl, a small file of OIG, into data/OIG-chip2/files/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tools/environment.sh
python=$(kit_python)
exec "$python" data/prepare_data.py "$@" --dest "$PWD/data/OIG-chip2/files" \
    --data-source https://huggingface.co/datasets/laion/OIG/resolve/main/unified_chip2.jsonl
