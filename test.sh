#!/usr/bin/env bash
# Make .venv if it is not there, check the style, run the tests.
#
#   bash test.sh              all but the long proofs
#   bash test.sh --long       the long proofs too; the browser that some need is installed where apt and root are there
#   bash test.sh -k chat      other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. tools/environment.sh

selection=(-m "not long")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --long ]; then
        selection=()
    else
        arguments+=("$argument")
    fi
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
# "${a[@]+...}": an empty array counts as unset in bash 3.2.
exec "$kit_venv/bin/python" -m pytest -n 3 --dist worksteal ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
