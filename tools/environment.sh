# The Python environment of a checkout; sourced by quickstart.sh, test.sh and the recipes, for bash 3.2 and newer.
#
#   kit_python              print the Python that has the kit: .venv's, else $PYTHON, else python or python3 on PATH
#   make_environment [dev]  make .venv and install the kit into it with pip, unless that was done before
#
# PYTHON                    the interpreter that .venv is made from (default: the first usable one on PATH)
# OPENCHATKIT_TORCH_INDEX   the wheel index that torch is taken from (default: pip's own);
#                           https://download.pytorch.org/whl/cpu has the CPU-only build, much smaller on Linux

kit_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kit_venv=$kit_root/.venv
kit_torch=torch==2.13.0

fail() {
    echo "error: $*" >&2
    exit 2
}

kit_python() {
    if [ -x "$kit_venv/bin/python" ]; then
        echo "$kit_venv/bin/python"
    elif [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    else
        command -v python || command -v python3 ||
            fail "no Python found: make the environment first (bash quickstart.sh, or environment.yml with conda)"
    fi
}

# Print MAJOR.MINOR.MICRO of an interpreter, or nothing if it does not run.
python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true
}

# Whether a version is one that pyproject.toml's requires-python allows: 3.10 to 3.13.
version_fits() {
    case "$1" in
        3.10.* | 3.11.* | 3.12.* | 3.13.*) return 0 ;;
        *) return 1 ;;
    esac
}

# Print the interpreter to make .venv from: $PYTHON, or the first on PATH whose version fits.
find_base_python() {
    local candidate version found=""
    for candidate in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo python3 python3.13 python3.12 python3.11 python3.10 python); do
        version=$(python_version "$candidate")
        if version_fits "$version"; then
            echo "$candidate"
            return
        fi
        if [ -n "$version" ] && [ -z "$found" ]; then
            found="$candidate is Python $version"
        fi
    done
    [ -n "$found" ] || found="${PYTHON:-python3} does not run"
    fail "$found: Python 3.10 to 3.13 is needed; install one and name it, as in PYTHON=python3.12 bash ${0##*/}"
}

make_venv() {
    local base
    base=$(find_base_python) || exit $?
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module: install it (Debian, Ubuntu: apt install python3-venv) and run this again"
    echo "Making .venv with $base ($(python_version "$base"))"
    # A venv cut short has no pip and would fail at every later run, so it goes.
    trap 'rm -rf "$kit_venv"' EXIT
    "$base" -m venv "$kit_venv" || fail "$base -m venv .venv failed: see the message above"
    trap - EXIT
}

# Print what an installation depends on: pyproject.toml, the version of Python, where the checkout is, which torch.
installation() {
    "$kit_venv/bin/python" - "$kit_root" "$kit_torch ${OPENCHATKIT_TORCH_INDEX:-}" <<'PYTHON_END'
import hashlib, pathlib, sys
root, torch = sys.argv[1:]
parts = [(pathlib.Path(root) / "pyproject.toml").read_bytes(), sys.version.encode(), root.encode(), torch.encode()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON_END
}

make_environment() {
    local extra=${1:-} wanted version stamp
    [ -e "$kit_venv" ] || make_venv
    version=$(python_version "$kit_venv/bin/python")
    version_fits "$version" ||
        fail "$kit_venv holds ${version:+Python }${version:-no Python that runs}, not 3.10 to 3.13: remove it and run this again"
    wanted=$(installation)
    stamp=$kit_venv/installed${extra:+-$extra}
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    "$kit_venv/bin/python" -c 'import pip' 2>/dev/null || fail "$kit_venv has no pip: remove it and run this again"
    echo "Installing $kit_torch and the kit${extra:+ with its $extra tools} into .venv (once; some minutes)"
    if [ -z "${OPENCHATKIT_TORCH_INDEX:-}" ] && [ "$(uname)" = Linux ] && [ ! -e /dev/nvidiactl ]; then
        echo "(no NVIDIA GPU here: OPENCHATKIT_TORCH_INDEX=https://download.pytorch.org/whl/cpu takes a smaller torch)"
    fi
    pip_install ${OPENCHATKIT_TORCH_INDEX:+--index-url "$OPENCHATKIT_TORCH_INDEX"} "$kit_torch"
    pip_install -e "$kit_root${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
    # Every other extra includes the plain installation.
    echo "$wanted" >"$kit_venv/installed"
}

pip_install() {
    local quiet=--quiet
    if [ -t 1 ]; then
        quiet=
    fi
    "$kit_venv/bin/python" -m pip install --disable-pip-version-check $quiet "$@" ||
        fail "pip could not install ${*: -1}: see its message above"
}
