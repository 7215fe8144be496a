#!/usr/bin/env bash
# Run the tests with the oldest or the newest versions that pyproject.toml allows, or with those of constraints.txt.
#
#   bash tools/check_versions.sh oldest|newest|locked [--remove] [PYTEST ARGUMENTS]
#   bash tools/check_versions.sh lock       write constraints.txt: the newest versions of today, torch as LOCK_TORCH says
#
# The environment is made in .venv.WHICH-PYTHON and kept, --remove deletes it afterwards. PYTHON names the interpreter.
# With a torch from PyPI an environment takes up to 9 GB; OPENCHATKIT_TORCH_INDEX names another index, see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
# The torch of the lock is raised by hand, since each is a download of gigabytes for everybody.
LOCK_TORCH=${LOCK_TORCH:-2.13.0}

usage() {
    fail "expected oldest, newest, locked or lock, got '${1:-}': see the head of tools/check_versions.sh"
}

# Print the versions that uv chooses from pyproject.toml, one a line, with the options given.
resolve() {
    local folder
    folder=$(mktemp -d)
    "$python" -m venv "$folder/uv"
    "$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 || fail "pip could not install uv"
    "$folder/uv/bin/uv" pip compile pyproject.toml --extra dev --quiet --no-header --no-annotate "$@" ||
        fail "uv found no versions that go together: see above"
    rm -rf "$folder"
}

# Without what torch's own wheels ask for by themselves, which differs from one wheel index to the other.
without_cuda() {
    grep -vE '^(nvidia-|cuda-|triton|setuptools)'
}

which=${1:-}
case "$which" in oldest | newest | locked | lock) shift ;; *) usage "$which" ;; esac
python=$(find_base_python)
version=$(python_version "$python")
version=${version%.*}

if [ "$which" = lock ]; then
    {
        echo "# The versions that the tests passed with; written by: bash tools/check_versions.sh lock"
        resolve --universal --python-version 3.10 --constraint <(echo "torch==$LOCK_TORCH") | without_cuda
    } >constraints.txt.new
    mv constraints.txt.new constraints.txt
    exit
fi

remove=
if [ "${1:-}" = --remove ]; then
    remove=1
    shift
fi
export OPENCHATKIT_VENV=$kit_root/.venv.$which-$version
[ -z "$remove" ] || trap 'rm -rf "$OPENCHATKIT_VENV"' EXIT
case "$which" in
    locked) ;;
    newest) export OPENCHATKIT_CONSTRAINTS= ;;
    oldest)
        export OPENCHATKIT_CONSTRAINTS=$kit_root/.venv.oldest-$version.txt
        resolve --resolution lowest-direct --python-version "$version" | without_cuda >"$OPENCHATKIT_CONSTRAINTS"
        ;;
esac
# Not exec: the environment is removed afterwards.
status=0
bash test.sh "$@" || status=$?
"$OPENCHATKIT_VENV/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(torch|transformers|huggingface.hub|tokenizers|datasets|numpy) ' || true
exit "$status"
