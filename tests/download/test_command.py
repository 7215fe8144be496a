"""The commands that fetch data (`command`, `sources`, `local`): where files land, what is printed, what never is."""

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hub_server import TOKEN, Fault, Hub, serving

from openchatkit import paths
from openchatkit.download import command as fetching

LINES = b'{"text": "<human>: Hi\\n<bot>: Hello\\n"}\n' * 1000
FILES = {
    "unified_ni.jsonl.gz": gzip.compress(LINES, mtime=0),
    "unified_p3.jsonl": b"{}\n",
    "unified_p3_more.jsonl": b"[]",
    "README.md": b"about",
}
CANARY = "AKIACanaryOfTheTests"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub) as served:
        served.add("datasets/laion/OIG", FILES | {"unified_chip2.jsonl": LINES})
        served.add("datasets/ontocord/OIG-moderation", {"OIG_safety_v0.1.jsonl": LINES, "README.md": b""})
        yield served


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the commands need, so that they fetch into a folder of the test's."""
    shutil.copytree(paths.ROOT / "openchatkit", tmp_path / "openchatkit", ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("data/OIG/prepare.py", "data/OIG-chip2/prepare.sh", "data/OIG-moderation/prepare.py"):
        (tmp_path / script).parent.mkdir(parents=True)
        shutil.copy(paths.ROOT / script, tmp_path / script)
    (tmp_path / "tools").mkdir()
    for script in ("data/prepare_data.py", "tools/environment.sh"):
        shutil.copy(paths.ROOT / script, tmp_path / script)
    return tmp_path


def run(checkout: Path, endpoint: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(checkout / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(checkout),
        **environment,
    }
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def prepare(checkout: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(checkout, endpoint, sys.executable, "data/OIG/prepare.py", *arguments, **environment)


def test_oig_fetches_what_is_named_once(hub, checkout):
    files = checkout / "data" / "OIG" / "files"
    for _ in range(2):
        done = prepare(checkout, hub.address, "--files", "unified_ni")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{files / 'unified_ni.jsonl.gz'}\n"
        assert (files / "unified_ni.jsonl.gz").read_bytes() == FILES["unified_ni.jsonl.gz"]
        assert hub.fetched("datasets/laion/OIG") == ["unified_ni.jsonl.gz"]
    done = prepare(checkout, hub.address)
    assert {Path(line).name for line in done.stdout.split()} == {*FILES, "unified_chip2.jsonl"} - {"README.md"}
    assert sorted(hub.fetched("datasets/laion/OIG")[1:]) == [
        "unified_chip2.jsonl",
        "unified_p3.jsonl",
        "unified_p3_more.jsonl",
    ]


def test_oig_has_no_such_file(hub, checkout):
    done = prepare(checkout, hub.address, "--files", "unified_nil")
    assert done.returncode == 2
    message = "error: laion/OIG holds no file unified_nil: expected one of README.md, unified_chip2.jsonl, unified_ni"
    assert done.stderr.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline(checkout, environment):
    done = prepare(checkout, "http://127.0.0.1:9", "--files", "unified_ni", **environment)
    assert done.returncode == 2
    message = "error: cannot fetch laion/OIG: the hub cannot be reached; connect and run again"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert not (checkout / "data" / "OIG" / "files").exists()


def test_chip2_and_moderation(hub, checkout):
    chip2 = checkout / "data" / "OIG-chip2"
    done = run(checkout, hub.address, "bash", "data/OIG-chip2/prepare.sh")
    assert done.stdout == f"{chip2 / 'files' / 'unified_chip2.jsonl'}\n", done.stderr
    assert (chip2 / "files" / "unified_chip2.jsonl").read_bytes() == LINES
    moderation = checkout / "data" / "OIG-moderation"
    done = run(checkout, hub.address, sys.executable, "data/OIG-moderation/prepare.py")
    assert {Path(line).name for line in done.stdout.split()} == {"OIG_safety_v0.1.jsonl", "README.md"}, done.stderr
    assert (moderation / "files" / "OIG_safety_v0.1.jsonl").read_bytes() == LINES


def test_two_processes_fetch_once(hub, checkout):
    path = hub.path("datasets/laion/OIG", "unified_ni.jsonl.gz")
    first = subprocess.Popen
    command = [sys.executable, "data/OIG/prepare.py", "--files", "unified_ni"]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(checkout / "h"), "PYTHONPATH": str(checkout)}
    both = [first(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert hub.ranges(path) == [None]


def call(*arguments: str) -> int:
    """`prepare_data.py` in this process; its exit status."""
    with pytest.raises(SystemExit) as end:
        fetching.prepare_data(list(arguments))
    return end.value.code


def tar_of(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("a.jsonl", LINES, ["a.jsonl"]),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0), ["a.jsonl"]),
        ("a.jsonl.zst", zstandard.compress(LINES), ["a.jsonl"]),
        ("a.tar.zst", zstandard.compress(tar_of({"x/a.jsonl": LINES, "b.jsonl": LINES})), ["x/a.jsonl", "b.jsonl"]),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_an_address_is_fetched_and_unpacked_once(hub, tmp_path, capsys, name, body, expected, keep):
    hub.files[f"/{name}"] = body
    expected = [name] if keep else expected
    flags = ["--keep-packed"] if keep else []
    for _ in range(2):
        assert call("-s", f"{hub.address}/{name}", "-d", str(tmp_path / "new"), *flags) == 0
        assert capsys.readouterr().out.split() == [str(tmp_path / "new" / each) for each in expected]
    for each in expected:
        assert (tmp_path / "new" / each).read_bytes() == (body if keep else LINES)
    assert {path for path in (tmp_path / "new").iterdir() if not path.name.startswith(".")} == {
        tmp_path / "new" / each.split("/")[0] for each in expected
    }
    assert hub.ranges(f"/{name}") == [None]


@pytest.mark.parametrize(
    "source",
    ["laion/OIG", "https://huggingface.co/datasets/laion/OIG", "https://huggingface.co/datasets/laion/OIG.git"],
)
def test_a_data_set_of_the_hub(hub, tmp_path, capsys, monkeypatch, source):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for _ in range(2):
        assert call("-s", source, "-d", str(tmp_path)) == 0
        assert {Path(line).name for line in capsys.readouterr().out.split()} == {
            "unified_ni.jsonl",
            "unified_chip2.jsonl",
            *FILES,
        } - {"unified_ni.jsonl.gz"}
    assert (tmp_path / "unified_ni.jsonl").read_bytes() == LINES
    assert len(hub.fetched("datasets/laion/OIG")) == len(FILES) + 1
    # One unpacked file that is gone brings its packed file back, and no other.
    (tmp_path / "unified_ni.jsonl").unlink()
    assert call("-s", source, "-d", str(tmp_path)) == 0
    assert (tmp_path / "unified_ni.jsonl").read_bytes() == LINES
    assert hub.fetched("datasets/laion/OIG")[len(FILES) + 1 :] == ["unified_ni.jsonl.gz"]


def test_a_repository_on_github(hub, tmp_path, capsys, monkeypatch):
    from openchatkit.download import http

    asked, open_url = [], http.open_url

    def local(address, *arguments, **options):
        asked.append(address)
        return open_url(f"{hub.address}/archive.tar.gz", *arguments, **options)

    monkeypatch.setattr(http, "open_url", local)
    hub.files["/archive.tar.gz"] = gzip.compress(tar_of({"kit-1234/data/a.jsonl": LINES, "kit-1234/README.md": b"hi"}))
    for _ in range(2):
        assert call("-s", "https://github.com/org/kit.git", "-d", str(tmp_path)) == 0
        assert capsys.readouterr().out.split() == [str(tmp_path / "data/a.jsonl"), str(tmp_path / "README.md")]
    assert asked == ["https://github.com/org/kit/archive/HEAD.tar.gz"]


def test_files_and_folders_of_this_machine(tmp_path, capsys):
    folder = tmp_path / "mine"
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "b.jsonl").write_bytes(LINES)
    (folder / ".hidden").write_bytes(LINES)
    for _ in range(2):
        assert call("-s", str(folder), "-d", str(tmp_path / "files")) == 0
        assert capsys.readouterr().out.split() == [
            str(tmp_path / "files" / name) for name in ("b.jsonl", "deeper/a.jsonl")
        ]
    assert (tmp_path / "files" / "deeper" / "a.jsonl").read_bytes() == LINES
    assert (folder / "deeper" / "a.jsonl.gz").exists()
    assert call("-s", str(folder / "b.jsonl"), "-d", str(tmp_path / "one")) == 0
    assert (tmp_path / "one" / "b.jsonl").read_bytes() == LINES


def test_damaged_data_leaves_nothing(hub, tmp_path, capsys):
    hub.files["/a.jsonl.gz"] = gzip.compress(os.urandom(10_000))[:-100]
    assert call("-s", f"{hub.address}/a.jsonl.gz", "-d", str(tmp_path)) == 2
    assert f"error: {tmp_path / 'a.jsonl.gz'} is damaged or cut short" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "flags", "variable"),
    [
        (["-a", CANARY], "-a/--access-key-id", "AWS_ACCESS_KEY_ID"),
        ([f"--access-key-id={CANARY}"], "-a/--access-key-id", "AWS_ACCESS_KEY_ID"),
        ([f"-k{CANARY}"], "-k/--secret-access-key", "AWS_SECRET_ACCESS_KEY"),
        (["--secret-access-key", CANARY, "--debug"], "-k/--secret-access-key", "AWS_SECRET_ACCESS_KEY"),
        (["-k"], "-k/--secret-access-key", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_keys_on_the_command_line_are_refused(tmp_path, capsys, arguments, flags, variable):
    assert call("-s", "s3://bucket/key", "-d", str(tmp_path), *arguments) == 2
    printed = capsys.readouterr()
    assert CANARY not in printed.out + printed.err
    assert printed.err == (
        f"error: {flags} is not taken, since other users see command lines: set {variable} in the environment instead, "
        "and change the key if it was typed here\n"
    )


def test_help_says_where_keys_go_instead(capsys):
    assert call("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert f" refused: other users see command lines; set {variable} instead" in printed


def test_debug_logs_requests(hub, tmp_path, capsys):
    hub.files["/a.jsonl"] = LINES
    assert call("-s", f"{hub.address}/a.jsonl?signature={CANARY}", "-d", str(tmp_path), "--debug") == 0
    printed = capsys.readouterr().err
    assert f"GET {hub.address}/a.jsonl from byte 0\n" in printed
    assert CANARY not in printed


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("hdfs://host/a", "hdfs://host/a: expected http://, https://, s3:// or a path"),
    ],
)
def test_sources_that_are_none(tmp_path, capsys, source, message):
    assert call("-s", source, "-d", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_refusal_is_one_line(hub, tmp_path, capsys):
    hub.faults["/a.jsonl"] = [Fault(status=403)]
    assert call("-s", f"{hub.address}/a.jsonl", "-d", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"error: {hub.address}/a.jsonl: the server answers 403 Forbidden: it is not public, or the address has "
        "expired: fetch it with a program that can log in\n"
    )


def test_a_file_called_source(tmp_path):
    """What a folder's own lock was named after once."""
    (tmp_path / "source").write_bytes(LINES)
    command = [sys.executable, "data/prepare_data.py", "-s", str(tmp_path / "source"), "-d", str(tmp_path / "new")]
    subprocess.run(command, cwd=paths.ROOT, check=True, timeout=60)
    assert (tmp_path / "new" / "source").read_bytes() == LINES
