# The Python environment of a checkout; sourced by quickstart.sh, test.sh and the recipes, for bash 3.2 and newer.
#
#   kit_python              print the Python that has the kit: .venv's, else $PYTHON, else python or python3 on PATH
#   make_environment [dev]  make .venv and install the kit into it with pip, unless that was done before
#
# PYTHON                    the interpreter that .venv is made from (default: the first usable one on PATH)
# OPENCHATKIT_TORCH_INDEX   the wheel index that torch is taken from (default: pip's own);
#                           https://download.pytorch.org/whl/cpu has the CPU-only build, much smaller on Linux
# OPENCHATKIT_CONSTRAINTS   the file of versions to install by (default: constraints.txt, with which the tests passed;
#                           empty: the newest that pyproject.toml allows)
# OPENCHATKIT_VENV          the folder of the environment (default: .venv)

kit_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kit_venv=${OPENCHATKIT_VENV:-$kit_root/.venv}
kit_constraints=${OPENCHATKIT_CONSTRAINTS-$kit_root/constraints.txt}
# Gigabytes that an installation takes, pip's own temporary files counted: with torch for the CPU, and with CUDA's.
kit_room=4
kit_room_cuda=12

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

# Print what an installation depends on: what may be installed, the version of Python, where the checkout and torch are.
installation() {
    "$kit_venv/bin/python" - "$kit_root" "$kit_constraints" "${OPENCHATKIT_TORCH_INDEX:-}" <<'PYTHON_END'
import hashlib, pathlib, sys
root, constraints, index = sys.argv[1:]
files = [pathlib.Path(root) / "pyproject.toml", *([pathlib.Path(constraints)] if constraints else [])]
parts = [*(file.read_bytes() for file in files), sys.version.encode(), root.encode(), index.encode()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON_END
}

# Stop before anything is fetched where the disk cannot hold it; say what is needed where it might not.
check_room() {
    local free="" line
    line=$(df -Pk "$kit_root" 2>/dev/null) || return 0
    { read -r _ && read -r _ _ _ free _; } <<<"$line"
    case "$free" in '' | *[!0-9]*) return 0 ;; esac
    free=$((free / 1000000))
    [ "$free" -ge "$kit_room" ] ||
        fail "$kit_root has $free GB free, the installation takes about $kit_room GB: make room and run this again"
    if [ "$free" -lt "$kit_room_cuda" ] && [ -z "${OPENCHATKIT_TORCH_INDEX:-}" ] && [ "$(uname)" = Linux ]; then
        echo "note: $free GB are free; torch with CUDA takes about $kit_room_cuda GB, without it $kit_room GB:" \
            "OPENCHATKIT_TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the latter" >&2
    fi
}

make_environment() {
    local extra=${1:-} wanted version stamp
    [ -e "$kit_venv" ] || make_venv
    version=$(python_version "$kit_venv/bin/python")
    version_fits "$version" ||
        fail "$kit_venv holds ${version:+Python }${version:-no Python that runs}, not 3.10 to 3.13: remove it and run this again"
    [ -z "$kit_constraints" ] || [ -r "$kit_constraints" ] ||
        fail "OPENCHATKIT_CONSTRAINTS=$kit_constraints cannot be read: name a file, or leave it empty for the newest versions"
    wanted=$(installation)
    stamp=$kit_venv/installed${extra:+-$extra}
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    "$kit_venv/bin/python" -c 'import pip' 2>/dev/null || fail "$kit_venv has no pip: remove it and run this again"
    check_room
    echo "Installing the kit${extra:+ with its $extra tools} into ${kit_venv##*/} (once; some minutes)"
    if [ -z "${OPENCHATKIT_TORCH_INDEX:-}" ] && [ "$(uname)" = Linux ] && [ ! -e /dev/nvidiactl ]; then
        echo "(no NVIDIA GPU here: OPENCHATKIT_TORCH_INDEX=https://download.pytorch.org/whl/cpu takes a smaller torch)"
    fi
    # What was installed for other extras, or from another checkout, no longer stands.
    rm -f "$kit_venv"/installed*
    # torch first and alone: its index has nothing else.
    pip_install ${OPENCHATKIT_TORCH_INDEX:+--index-url "$OPENCHATKIT_TORCH_INDEX"} "$(torch_wanted)"
    pip_install -e "$kit_root${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
    # Every other extra includes the plain installation.
    echo "$wanted" >"$kit_venv/installed"
}

# Print what pip is asked for as torch: the range of pyproject.toml, which the constraints narrow to one version.
torch_wanted() {
    local line
    while read -r line; do
        case "$line" in
            '"torch>'*)
                line=${line#\"}
                echo "${line%%\"*}"
                return
                ;;
        esac
    done <"$kit_root/pyproject.toml"
    fail "$kit_root/pyproject.toml names no torch: restore the file"
}

pip_install() {
    local quiet=--quiet what=${*: -1} said reason
    if [ -t 1 ]; then
        quiet=
    fi
    said=$kit_venv/pip-errors
    if "$kit_venv/bin/python" -m pip install --disable-pip-version-check $quiet \
        ${kit_constraints:+--constraint "$kit_constraints"} "$@" 2>"$said"; then
        rm -f "$said"
        return
    fi
    cat "$said" >&2
    reason=$(cat "$said")
    rm -f "$said"
    case "$reason" in
        *"No space left on device"*)
            fail "the disk is full, with $what half installed: make room ($kit_room GB, with CUDA $kit_room_cuda GB) and run this again" ;;
        *Connection*error* | *NewConnectionError* | *"Read timed out"* | *"Temporary failure in name resolution"* | *ProxyError*)
            fail "the wheel index${OPENCHATKIT_TORCH_INDEX:+ $OPENCHATKIT_TORCH_INDEX} does not answer: check the network, proxy or OPENCHATKIT_TORCH_INDEX, and run this again" ;;
        *"No matching distribution found for "*)
            reason=${reason##*"No matching distribution found for "}
            reason=${reason%%[$'\n' ]*}
            fail "no index offers $reason for this Python and machine: try another Python (3.10 to 3.13), or OPENCHATKIT_CONSTRAINTS= (empty) for other versions" ;;
        *ResolutionImpossible*)
            fail "the versions of ${kit_constraints:-pyproject.toml} exclude each other, see above: OPENCHATKIT_CONSTRAINTS= (empty) takes the newest" ;;
    esac
    fail "pip could not install $what: see its message above"
}
