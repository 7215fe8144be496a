#!/usr/bin/env bash
# Check correctness and speed on one GPU, without a network: unpack the wheels that gpu_wheels.sh has collected, if
# they are there, and run gpu_check.py with the arguments given. Results go to --output, or to $OUT where that is set.
#
#   bash benchmarks/gpu_check.sh                              all parts, within 480 seconds
#   bash benchmarks/gpu_check.sh --parts attention,loss
#   PYTHON=python3.12 bash benchmarks/gpu_check.sh --device cpu
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

wheels=$root/benchmarks/.wheels
if ls "$wheels"/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$wheels"/*.whl; then
        export PYTHONPATH=$PYTHONPATH:$site
    else
        echo "note: the wheels in benchmarks/.wheels are not for this Python; going on without them" >&2
    fi
fi

status=0
"$python" "$root/benchmarks/gpu_check.py" "$@" || status=$?
exit "$status"
