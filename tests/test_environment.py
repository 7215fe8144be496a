"""test.sh and quickstart.sh with a stand-in for Python: what they ask of it, and every line they end with."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from openchatkit.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Answers as an interpreter does where the scripts ask one; what pip, pytest and the kit's own scripts are told goes to
# $LOG. A script leaves what it is known by, unless it is the one that $FAKE_FAILS names.
STAND_IN = """#!/bin/sh
case "$*" in
    *version_info*) echo "$FAKE_VERSION" ;;
    *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
    "-m venv "*) [ -z "$FAKE_VENV_BREAKS" ] || exit 1
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/ruff" ;;
    *"import pip"*) exit "${FAKE_NO_PIP:-0}" ;;
    "-m pip "*) echo "$@" >>"$LOG"; echo "${FAKE_PIP_SAYS:-}" >&2; exit "${FAKE_PIP_STATUS:-0}" ;;
    "-m mypy") echo "Found 1 error"; exit "${FAKE_MYPY_STATUS:-0}" ;;
    "-m pytest "*) echo "$@" >>"$LOG"; exit "${FAKE_PYTEST_STATUS:-0}" ;;
    "- "*) exec "$REAL_PYTHON" "$@" ;;
    *.py*)
        echo "$@" >>"$LOG"
        case "$1" in
            "${FAKE_FAILS:-none}") exit "$FAKE_STATUS" ;;
            data/*) leaves=data/python-docs/files/passages.jsonl ;;
            pretrained/*) leaves=pretrained/Quickstart/Quickstart/manifest.json ;;
            retrieval/*) leaves=data/python-docs/files/index/manifest.json ;;
            tools/convert*) leaves=huggingface_models/Quickstart/config.json ;;
            *) exit 0 ;;
        esac
        mkdir -p "${leaves%/*}" && echo >"$leaves" ;;
esac
"""


# What pip is asked for first: the range, which the constraints narrow to one version.
TORCH = next(
    requirement
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    if requirement.startswith("torch")
)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a stand-in for Python on PATH; `run(*arguments, script=, **environment)` runs test.sh in it."""
    root = tmp_path / "a checkout"
    for folder in ("tools", "training"):
        (root / folder).mkdir(parents=True)
    needed = (
        "test.sh",
        "quickstart.sh",
        "pyproject.toml",
        "constraints.txt",
        "tools/environment.sh",
        "training/_recipe.sh",
        "training/finetune_Quickstart.sh",
    )
    for name in needed:
        shutil.copy(ROOT / name, root / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python3").write_text(STAND_IN)
    (programs / "python3").chmod(0o755)
    log = tmp_path / "log"
    # Only what the scripts use: on a bare machine there is little more, and no other Python must be found.
    for name in ("bash", "cat", "cp", "dirname", "mkdir", "rm", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    base = {"PATH": str(programs), "LOG": str(log), "REAL_PYTHON": sys.executable, "FAKE_VERSION": "3.12.1"}

    def run(*arguments: str, script: str = "test.sh", **environment: str) -> SimpleNamespace:
        log.write_text("")
        result = subprocess.run(
            [shutil.which("bash"), str(root / script), *arguments],
            capture_output=True,
            text=True,
            env={**base, **environment},
            cwd="/",
        )
        calls = log.read_text().splitlines()
        return SimpleNamespace(status=result.returncode, out=result.stdout, err=result.stderr, calls=calls)

    return SimpleNamespace(root=root, run=run)


def test_torch_comes_first_and_alone_and_a_second_run_calls_no_pip(checkout):
    first = checkout.run()
    installs = [call.split("install ")[1] for call in first.calls if call.startswith("-m pip")]
    flags = f"--disable-pip-version-check --quiet --constraint {checkout.root}/constraints.txt"
    assert installs == [f"{flags} {TORCH}", f"{flags} -e {checkout.root}[dev]"]
    assert checkout.run().calls == ["-m pytest -n 3 --dist worksteal -m not long"]


def test_the_index_of_torch_is_for_torch_alone(checkout):
    calls = checkout.run(OPENCHATKIT_TORCH_INDEX="https://example.org/cpu").calls
    assert [("--index-url https://example.org/cpu" in call) for call in calls] == [True, False, False]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_what_may_be_installed_has_changed_so_it_installs_again(checkout, name):
    checkout.run()
    with open(checkout.root / name, "a") as file:
        file.write("\n# changed\n")
    assert len(checkout.run().calls) == 3


def test_without_constraints_the_newest_versions_are_installed(checkout):
    calls = checkout.run(OPENCHATKIT_CONSTRAINTS="").calls
    assert len(calls) == 3
    assert not [call for call in calls if "--constraint" in call]


def test_constraints_that_are_not_there(checkout):
    result = checkout.run(OPENCHATKIT_CONSTRAINTS="/nowhere/versions.txt")
    assert result.status == 2
    assert result.err.startswith("error: OPENCHATKIT_CONSTRAINTS=/nowhere/versions.txt cannot be read: name a file")
    assert result.calls == []


def test_another_folder_for_the_environment(checkout):
    checkout.run(OPENCHATKIT_VENV=str(checkout.root / ".venv.other"))
    assert (checkout.root / ".venv.other" / "installed-dev").is_file()
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "ERROR: No matching distribution found for numpy==2.9.9",
            "no index offers numpy==2.9.9 for this Python and machine: try another Python (3.10 to 3.13), or "
            "OPENCHATKIT_CONSTRAINTS= (empty) for other versions",
        ),
        (
            "HTTPSConnectionPool(host='example.org', port=443): Max retries exceeded (NewConnectionError(...))",
            "the wheel index https://example.org/cpu does not answer: check the network, proxy or "
            "OPENCHATKIT_TORCH_INDEX, and run this again",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            f"the disk is full, with {TORCH} half installed: make room (4 GB, with CUDA 12 GB) and run this again",
        ),
        (
            "ERROR: ResolutionImpossible: for help visit ...",
            "the versions of {root}/constraints.txt exclude each other, see above: OPENCHATKIT_CONSTRAINTS= (empty) "
            "takes the newest",
        ),
    ],
)
def test_why_pip_failed_is_said_in_one_line(checkout, said, told):
    result = checkout.run(FAKE_PIP_STATUS="1", FAKE_PIP_SAYS=said, OPENCHATKIT_TORCH_INDEX="https://example.org/cpu")
    assert result.status == 2
    assert result.err.splitlines() == [said, f"error: {told.format(root=checkout.root)}"]


def test_no_room_for_the_installation_is_said_before_anything_is_fetched(checkout):
    df = checkout.root.parent / "programs" / "df"
    free = "Filesystem 1024-blocks Used Available Capacity Mounted on\\n/dev/vda 99 9 {} 9%% /\\n"
    df.write_text(f"#!{shutil.which('bash')}\nprintf '{free.format(3_200_000)}'\n")
    df.chmod(0o755)
    full = checkout.run()
    assert (full.status, full.calls) == (2, [])
    assert full.err == (
        f"error: {checkout.root} has 3 GB free, the installation takes about 4 GB: make room and run this again\n"
    )
    df.write_text(f"#!{shutil.which('bash')}\nprintf '{free.format(7_000_000)}'\n")
    narrow = checkout.run()
    assert narrow.status == 0
    if sys.platform == "linux":
        assert narrow.err.startswith("note: 7 GB are free; torch with CUDA takes about 12 GB, without it 4 GB:")


def test_an_installation_that_failed_is_tried_again(checkout):
    failed = checkout.run(FAKE_PIP_STATUS="1")
    assert failed.status == 2
    assert failed.err.splitlines()[-1] == f"error: pip could not install {TORCH}: see its message above"
    assert len(checkout.run().calls) == 3


def test_arguments_go_to_pytest_and_its_status_comes_back(checkout):
    result = checkout.run("--long", "-k", "two words", FAKE_PYTEST_STATUS="5")
    assert result.calls[-1] == "-m pytest -n 3 --dist worksteal -k two words"
    assert result.status == 5


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({"FAKE_MYPY_STATUS": "0"}, 0, ""),
        ({"FAKE_MYPY_STATUS": "1"}, 1, "error: types do not fit:\nFound 1 error\n"),
        ({"FAKE_MYPY_STATUS": "1", "OPENCHATKIT_CONSTRAINTS": ""}, 0, ""),
        ({"FAKE_MYPY_STATUS": "1", "FAKE_VERSION": "3.10.4"}, 0, ""),
    ],
    ids=["right", "wrong", "other versions", "Python 3.10"],
)
def test_types_are_checked_with_the_locked_versions(checkout, environment, status, said):
    checkout.run(**environment)
    result = checkout.run(**environment)
    assert (result.status, result.err) == (status, said)


@pytest.mark.parametrize("version", ["2.7.18", "3.9.18", "3.14.0", "4.0.0"])
def test_a_python_that_does_not_fit(checkout, version):
    result = checkout.run(FAKE_VERSION=version)
    assert result.status == 2
    assert result.err == (
        f"error: python3 is Python {version}: Python 3.10 to 3.13 is needed; "
        "install one and name it, as in PYTHON=python3.12 bash test.sh\n"
    )


def test_a_python_that_is_not_there(checkout):
    result = checkout.run(PYTHON="/nowhere/python")
    assert result.status == 2
    assert result.err.startswith("error: /nowhere/python does not run: Python 3.10 to 3.13 is needed")


def test_the_first_python_that_fits_is_taken(checkout):
    programs = checkout.root.parent / "programs"
    (programs / "python3.11").write_text(STAND_IN.replace("$FAKE_VERSION", "3.11.4"))
    (programs / "python3.11").chmod(0o755)
    assert checkout.run(FAKE_VERSION="3.9.6").status == 0
    assert "3.11.4" in (checkout.root / ".venv" / "bin" / "python").read_text()


def test_no_venv_module(checkout):
    result = checkout.run(FAKE_NO_VENV="1")
    assert result.status == 2
    assert result.err == (
        "error: python3 has no venv module: install it (Debian, Ubuntu: apt install python3-venv) and run this again\n"
    )


def test_an_environment_cut_short_is_removed(checkout):
    result = checkout.run(FAKE_VENV_BREAKS="1")
    assert result.status == 2
    assert result.err == "error: python3 -m venv .venv failed: see the message above\n"
    assert not (checkout.root / ".venv").exists()


def test_an_environment_that_is_not_ours_to_mend(checkout):
    venv = checkout.root / ".venv"
    venv.mkdir()
    result = checkout.run()
    assert (result.status, result.err) == (
        2,
        f"error: {venv} holds no Python that runs, not 3.10 to 3.13: remove it and run this again\n",
    )
    venv.rmdir()
    result = checkout.run(FAKE_NO_PIP="1")
    assert (result.status, result.err) == (2, f"error: {venv} has no pip: remove it and run this again\n")


def test_recipes_without_any_python_say_what_to_make(checkout):
    recipe = checkout.root / "training" / "finetune_Pythia-1.4B.sh"
    shutil.copy(ROOT / "training" / recipe.name, recipe)
    (checkout.root.parent / "programs" / "python3").unlink()
    path = {"PATH": str(checkout.root.parent / "programs")}
    result = subprocess.run([shutil.which("bash"), str(recipe)], capture_output=True, text=True, env=path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python found: make the environment first (bash quickstart.sh")


QUICKSTART = [
    "data/python-docs/prepare.py",
    "pretrained/Quickstart/prepare.py",
    "training/launch.py",
    "tools/convert_to_hf_gptneox.py",
    "tools/quickstart_score.py",
    "retrieval/build_index.py",
    "tools/quickstart_score.py",
]


def scripts(calls: list[str], root: Path) -> list[str]:
    return [call.replace(f"{root}/", "").split()[0] for call in calls if not call.startswith("-m pip")]


def test_the_quickstart_goes_the_whole_way_once(checkout):
    first = checkout.run(script="quickstart.sh", FINETUNE_CHECKPOINT_PATH="elsewhere", FINETUNE_DATA="other.jsonl")
    assert (first.status, first.err) == (0, "")
    assert scripts(first.calls, checkout.root) == QUICKSTART
    assert not [call for call in first.calls if "elsewhere" in call or "other.jsonl" in call]
    assert not [call for call in first.calls if "[dev]" in call]
    assert "inference/bot.py --model huggingface_models/Quickstart" in first.out
    second = checkout.run(script="quickstart.sh")
    assert scripts(second.calls, checkout.root) == ["tools/quickstart_score.py"] * 2
    assert second.out.count(": done before") == 5


def test_the_quickstart_stops_where_a_step_fails_and_goes_on_from_there(checkout):
    training = str(checkout.root / "training" / "launch.py")
    failed = checkout.run(script="quickstart.sh", FAKE_FAILS=training, FAKE_STATUS="2")
    assert failed.status == 2
    assert failed.err == (
        "error: step 3 of quickstart.sh ended with status 2, see above; run it again to go on from there\n"
    )
    assert scripts(checkout.run(script="quickstart.sh").calls, checkout.root) == QUICKSTART[2:]


@pytest.mark.parametrize("status", ["75", "130"])
def test_a_quickstart_that_was_asked_to_stop_says_so_and_goes_on_from_there(checkout, status):
    training = str(checkout.root / "training" / "launch.py")
    stopped = checkout.run(script="quickstart.sh", FAKE_FAILS=training, FAKE_STATUS=status)
    assert stopped.status == int(status)
    assert stopped.err == ""
    last = re.sub(r"\d+:\d\d", "M:SS", stopped.out.splitlines()[-1])
    assert last == "Stopped in step 3/7 after M:SS. What is done is kept: bash quickstart.sh goes on from there."
    assert scripts(checkout.run(script="quickstart.sh").calls, checkout.root) == QUICKSTART[2:]


def test_the_tests_environment_will_do_for_the_quickstart(checkout):
    checkout.run()
    assert not [call for call in checkout.run(script="quickstart.sh").calls if call.startswith("-m pip")]


def test_an_environment_that_another_checkout_has_taken_over_is_installed_again(checkout, tmp_path):
    shared = {"OPENCHATKIT_VENV": str(tmp_path / "shared")}
    checkout.run(**shared)
    other = shutil.copytree(checkout.root, tmp_path / "other")
    checkout.run(script=str(other / "quickstart.sh"), **shared)
    assert [call for call in checkout.run(**shared).calls if call.startswith("-m pip")]
    assert not [call for call in checkout.run(**shared).calls if call.startswith("-m pip")]


def test_conda_installs_the_same(checkout):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert any(package in ("python=3.11", "python=3.12") for package in packages)
    assert pip["pip"] == ["-c constraints.txt", "-e .[gpu,wandb,s3]"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "bash test.sh" in Path(ROOT / ".ci" / "run").read_text()


def test_the_lock_lies_within_the_ranges_and_names_all_of_them():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, asked):
        if requirement.name == "openchatkit":
            continue
        versions = [pin for pin in pinned if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert versions, f"constraints.txt has no {requirement.name}: run bash tools/check_versions.sh lock"
        for pin in versions:
            (version,) = [entry.version for entry in pin.specifier]
            assert requirement.specifier.contains(version), f"{pin} is outside of {requirement}"


def test_check_versions_refuses_what_it_does_not_know():
    script = ROOT / "tools" / "check_versions.sh"
    result = subprocess.run([shutil.which("bash"), str(script), "latest"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: expected oldest, newest, locked or lock, got 'latest': see the head of tools/check_versions.sh\n"
    )
