#!/usr/bin/env bash
# Make .venv if it is not there, check style and types, run the tests.
#
#   bash test.sh              all but the long proofs
#   bash test.sh --long       the long proofs too; the browser that some need is installed where apt and root are there
#   bash test.sh --coverage   also print how much of the library the tests run, and list files below 90 %
#   bash test.sh -k chat      other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. tools/environment.sh

selection=(-m "not long")
arguments=()
coverage=
for argument in "$@"; do
    case "$argument" in
        --long) selection=() ;;
        --coverage) arguments+=(--cov=openchatkit --cov-report=) coverage=1 ;;
        *) arguments+=("$argument") ;;
    esac
done

make_environment dev
if [ "${#selection[@]}" = 0 ] && ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$EUID" = 0 ]; then
    echo "Installing chromium-driver, with Chromium, to test the chat page (once)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium-driver; } \
        >/dev/null || echo "note: apt could not install chromium-driver; the chat page is not tested in a browser" >&2
fi
# Tests that run these scripts start from what a user has.
unset OPENCHATKIT_VENV OPENCHATKIT_CONSTRAINTS
# Workers, and ranks within them, share the machine: one thread each is the fastest. Three, since many tests wait.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$kit_venv/bin/ruff" check .
"$kit_venv/bin/ruff" format --check .
# Types, while the tests run, many of which wait. The stubs of other versions, and of Python 3.10, differ.
types=$kit_venv/types.log
checking=
case "$(python_version "$kit_venv/bin/python")" in
    3.10.*) ;;
    *)
        if [ "$kit_constraints" = "$kit_root/constraints.txt" ]; then
            "$kit_venv/bin/python" -m mypy >"$types" 2>&1 &
            checking=$!
        fi
        ;;
esac
status=0
# "${a[@]+...}": an empty array counts as unset in bash 3.2.
"$kit_venv/bin/python" -m pytest -n 3 --dist worksteal ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"} || status=$?
if [ -n "$coverage" ]; then
    "$kit_venv/bin/python" -m coverage report --data-file=.coverage --sort=cover | awk '/TOTAL/ || ($NF + 0 < 90 && /%$/)'
fi
if [ -n "$checking" ] && ! wait "$checking"; then
    echo "error: types do not fit:" >&2
    cat "$types" >&2
    status=1
fi
exit "$status"
