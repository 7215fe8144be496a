"""Downloads from the hub (`hub`), by its real client: checked before they get a name; refusals say what to do."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from hub_server import TOKEN, Fault, Hub, git_name

from openchatkit.download import sources
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats import hf_model

OIG = "datasets/laion/OIG"
FILES = {
    "unified_ni.jsonl.gz": bytes(range(256)) * 1000,
    "unified_p3.jsonl": b'{"text": ""}\n' * 50_000,
    "more/unified_p3.jsonl": b"[]",
    "README.md": b"about",
    ".gitattributes": b"lfs",
}
HALF = 100_000
SMALL, SAFE, PICKLED = ["config.json"], ["model.safetensors"], ["pytorch_model.bin"]
MODEL = {"config.json": b"{}", "model.safetensors": b"safe" * 99_999, "pytorch_model.bin": b"old", "code.py": b"evil"}


@pytest.fixture
def oig(hub: Hub) -> Hub:
    hub.add(OIG, FILES)
    return hub


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.add("org/model", MODEL)
    return hub


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["unified_ni"], ["unified_ni.jsonl.gz"]),
        (["unified_*"], ["unified_ni.jsonl.gz", "unified_p3.jsonl"]),
        (["README.md", "more/*"], ["more/unified_p3.jsonl", "README.md"]),
        ([], ["unified_ni.jsonl.gz", "unified_p3.jsonl", "more/unified_p3.jsonl"]),
        (lambda name: name.startswith("unified_n"), ["unified_ni.jsonl.gz"]),
        (["*"], ["unified_ni.jsonl.gz", "unified_p3.jsonl", "more/unified_p3.jsonl", "README.md"]),
    ],
)
def test_files_by_name_and_glob(oig, tmp_path, retry, waits, wanted, expected):
    found = sources.fetch_dataset("laion/OIG", wanted, tmp_path, retry=retry)
    assert found == [tmp_path / name for name in expected]
    assert all(path.read_bytes() == FILES[name] for path, name in zip(found, expected, strict=True))
    assert oig.fetched(OIG) == expected
    # A second time nothing comes, nor for a copy made by hand.
    for note in tmp_path.rglob(".*.fetched.json"):
        note.unlink()
    assert sources.fetch_dataset("laion/OIG", wanted, tmp_path, retry=retry) == found
    assert oig.fetched(OIG) == expected
    assert waits == []


def test_the_token_goes_to_the_hub_and_nowhere_else(oig, tmp_path, retry, capsys):
    path = oig.path(OIG, "unified_ni.jsonl.gz")
    oig.faults[path] = [Fault(status=500), Fault(wrong_bytes=True)]
    sources.fetch_dataset("laion/OIG", ["unified_ni"], tmp_path, retry=retry)
    assert {request.authorization for request in oig.requests} == {f"Bearer {TOKEN}"}
    printed = capsys.readouterr()
    written = b"".join((tmp_path / name).read_bytes() for name in names(tmp_path))
    assert TOKEN not in printed.out + printed.err
    assert TOKEN.encode() not in written


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([Fault(status=500)], [None, None]),
        ([Fault(status=429, headers={"Retry-After": "7"})], [None, None]),
        ([Fault(cut_after=HALF)], [None, f"bytes={HALF}-"]),
        ([Fault(cut_after=HALF), Fault(ignore_range=True)], [None, f"bytes={HALF}-"]),
        ([Fault(wrong_bytes=True)], [None, None]),
        ([Fault(short_by=10)], [None, f"bytes={len(FILES['unified_ni.jsonl.gz']) - 10}-"]),
        ([Fault(cut_after=HALF), Fault(wrong_bytes=True)], [None, f"bytes={HALF}-", None]),
    ],
    ids=["500", "429", "cut", "ignores Range", "wrong bytes", "short", "wrong rest"],
)
def test_what_breaks_is_mended(oig, tmp_path, retry, waits, faults, ranges):
    path = oig.path(OIG, "unified_ni.jsonl.gz")
    oig.faults[path] = faults.copy()
    found = sources.fetch_dataset("laion/OIG", ["unified_ni"], tmp_path, retry=retry)
    assert found[0].read_bytes() == FILES["unified_ni.jsonl.gz"]
    assert oig.ranges(path) == ranges
    if faults[0].status == 429:
        assert waits == [7]


@pytest.mark.parametrize("name", ["unified_ni.jsonl.gz", "unified_p3.jsonl"])
def test_bytes_that_stay_wrong_never_get_a_name(oig, tmp_path, retry, name):
    oig.faults[oig.path(OIG, name)] = [Fault(wrong_bytes=True)] * 3
    kind, value = ("sha256", hashlib.sha256(FILES[name]).hexdigest())
    if name.endswith(".jsonl"):
        kind, value = ("git-sha1", git_name(FILES[name]))
    message = rf"laion/OIG/{name} came twice with other bytes .*: expected {kind} {value}, found {kind} "
    with pytest.raises(UserError, match=message):
        sources.fetch_dataset("laion/OIG", [name], tmp_path, retry=retry)
    assert names(tmp_path) - {"cache"} == set()
    assert oig.ranges(oig.path(OIG, name)) == [None, None]


def test_a_rerun_asks_for_the_missing_bytes_alone(oig, tmp_path, retry):
    path = oig.path(OIG, "unified_ni.jsonl.gz")
    oig.faults[path] = [Fault(cut_after=HALF)] + [Fault(status=503)] * 50
    with pytest.raises(Interrupted, match=r"laion/OIG/unified_ni.jsonl.gz: the server answers 503"):
        sources.fetch_dataset("laion/OIG", ["unified_*"], tmp_path, retry=retry)
    assert not (tmp_path / "unified_ni.jsonl.gz").exists()
    oig.faults.clear()
    oig.requests.clear()
    sources.fetch_dataset("laion/OIG", ["unified_*"], tmp_path, retry=retry)
    assert oig.ranges(path) == [f"bytes={HALF}-"]
    assert not [name for name in names(tmp_path) if ".part" in name or ".lock" in name]


def test_a_file_of_another_version_is_fetched_again(oig, tmp_path, retry):
    sources.fetch_dataset("laion/OIG", ["unified_ni"], tmp_path, retry=retry)
    changed = FILES | {"unified_ni.jsonl.gz": FILES["unified_ni.jsonl.gz"][::-1]}
    oig.add(OIG, changed)
    found = sources.fetch_dataset("laion/OIG", ["unified_ni"], tmp_path, retry=retry)
    assert found[0].read_bytes() == changed["unified_ni.jsonl.gz"]


def test_the_hub_is_busy(oig, tmp_path, retry, waits, monkeypatch):
    monkeypatch.setattr("time.sleep", waits.append)
    api = "/api/datasets/laion/OIG"
    oig.faults = {f"{api}{rest}": [Fault(status=503)] * 9 for rest in ("", "/revision/main")}
    with pytest.raises(Interrupted, match="laion/OIG: the hub answers 503: run again later"):
        sources.fetch_dataset("laion/OIG", [], tmp_path, retry=retry)
    oig.faults = {f"{api}{rest}": [Fault(status=503)] for rest in ("", "/revision/main")}
    assert sources.fetch_dataset("laion/OIG", ["README.md"], tmp_path, retry=retry)


def test_a_file_that_is_not_there(oig, tmp_path):
    message = (
        "laion/OIG holds no file unified_nil: expected one of .gitattributes, README.md, more/unified_p3.jsonl, uni"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        sources.fetch_dataset("laion/OIG", ["unified_nil"], tmp_path)
    with pytest.raises(UserError, match=r"laion/OIG holds no file of the kind that is wanted: expected one of \.git"):
        sources.fetch_dataset("laion/OIG", lambda name: False, tmp_path)
    assert oig.fetched(OIG) == []


def test_the_disk_is_too_small(oig, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    message = r"^2 files: 906\.0 kB are needed and .* has room for 1\.0 kB: make room, or name fewer files$"
    with pytest.raises(UserError, match=message):
        sources.fetch_dataset("laion/OIG", ["unified_*"], tmp_path / "files")
    assert oig.fetched(OIG) == []
    assert not (tmp_path / "files").exists()


def test_a_name_that_leads_outside(hub, tmp_path, retry):
    hub.add(OIG, {"../../evil.jsonl": b"{}"})
    with pytest.raises(UserError, match=r"'\.\./\.\./evil\.jsonl' leads outside the folder it is meant for"):
        sources.fetch_dataset("laion/OIG", [], tmp_path / "files", retry=retry)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        (
            "laion/nope",
            "cannot fetch laion/nope: the hub knows no such data set; check the spelling, or set HF_TOKEN if",
        ),
        ("laion//OIG", "cannot fetch laion//OIG: not a hub name; expected ORG/NAME or a folder"),
        (
            "laion/OIG",
            "cannot fetch laion/OIG: the hub asks for its licence to be accepted; accept it there and set HF_T",
        ),
    ],
)
def test_what_the_hub_refuses(oig, tmp_path, retry, waits, repository, message):
    oig.gated.add(OIG)
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        sources.fetch_dataset(repository, [], tmp_path, retry=retry)
    assert error.value.exit_status == 2
    assert waits == []


def test_a_token_that_the_hub_does_not_know(oig, tmp_path, retry):
    faults = [Fault(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})]
    oig.faults = {f"/api/datasets/laion/OIG{rest}": list(faults) for rest in ("", "/revision/main")}
    with pytest.raises(UserError, match=r"cannot fetch laion/OIG: .* HF_TOKEN"):
        sources.fetch_dataset("laion/OIG", [], tmp_path, retry=retry)


def test_pickles_are_left_where_there_are_safetensors(model, retry, capfd):
    folder = sources.fetch_model("org/model", SMALL, SAFE, PICKLED, retry=retry)
    assert "Fetching" not in capfd.readouterr().err  # no bar of the client's beside ours
    assert names(folder) == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert sorted(model.fetched("org/model")) == ["config.json", "model.safetensors"]
    assert sources.fetch_model("org/model", SMALL, SAFE, PICKLED, retry=retry) == folder
    assert len(model.fetched("org/model")) == 2


def test_pickles_are_fetched_where_there_is_nothing_else(hub, retry):
    hub.add("org/model", {name: body for name, body in MODEL.items() if name != "model.safetensors"})
    folder = sources.fetch_model("org/model", SMALL, SAFE, PICKLED, retry=retry)
    assert names(folder) == {"config.json", "pytorch_model.bin"}


def test_config_and_tokenizer_alone(model):
    assert names(hf_model.fetch("org/model", weights=False)) == {"config.json"}


def test_a_model_is_checked_and_resumed(model, tmp_path, retry):
    path = model.path("org/model", "model.safetensors")
    model.faults[path] = [Fault(cut_after=HALF), Fault(status=503), Fault(wrong_bytes=True)]
    folder = sources.fetch_model("org/model", SMALL, SAFE, retry=retry)
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert model.ranges(path) == [None, f"bytes={HALF}-", f"bytes={HALF}-", None]
    blobs = tmp_path / "cache" / "models--org--model" / "blobs"
    assert names(blobs) == {git_name(b"{}"), hashlib.sha256(MODEL["model.safetensors"]).hexdigest()}


def test_a_model_with_bytes_that_stay_wrong(model, tmp_path, retry):
    model.faults[model.path("org/model", "model.safetensors")] = [Fault(wrong_bytes=True)] * 2
    with pytest.raises(UserError, match=r"org/model/model\.safetensors came twice with other bytes"):
        sources.fetch_model("org/model", SMALL, SAFE, retry=retry)
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors")]
    model.faults.clear()
    assert names(sources.fetch_model("org/model", SMALL, SAFE, retry=retry)) == {
        "config.json",
        "model.safetensors",
    }


def test_the_cache_will_do_without_the_hub(model, retry, waits, monkeypatch, capsys):
    import huggingface_hub.constants

    folder = sources.fetch_model("org/model", SMALL, SAFE, PICKLED, retry=retry)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert sources.fetch_model("org/model", SMALL, SAFE, PICKLED, retry=retry) == folder
    assert "using what is in the cache" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match=r"^cannot fetch org/other: the hub cannot be reached and it is not in the cache; connect and run",
    ):
        sources.fetch_model("org/other", SMALL, retry=retry)
    assert waits == []


def test_a_folder_is_its_own_model(tmp_path, monkeypatch):
    assert sources.fetch_model(str(tmp_path), SMALL, SAFE) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert sources.fetch_model("~/mine", SMALL) == tmp_path / "mine"


@pytest.mark.parametrize("name", ["./model", "/no/where", "~/model", "a/b/c", "gpt2"])
def test_no_folder_and_no_hub_name(name):
    message = f"{name}: no such folder; pass a folder or a hub name such as EleutherAI/pythia-1.4b"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        sources.fetch_model(name, SMALL)


def test_one_file_by_its_address(oig, tmp_path, retry):
    address = "https://huggingface.co/datasets/laion/OIG/resolve/main/more/unified_p3.jsonl?download=true"
    assert sources.fetch(address, tmp_path, retry=retry) == tmp_path / "unified_p3.jsonl"
    assert (tmp_path / "unified_p3.jsonl").read_bytes() == b"[]"
    with pytest.raises(UserError, match=r"laion/OIG holds no file more/no\.jsonl"):
        sources.fetch(address.replace("unified_p3", "no"), tmp_path, retry=retry)


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"[]", b"{}"])
def test_what_answers_is_not_the_hub(oig, tmp_path, retry, monkeypatch, answer):
    import hub_server

    send = lambda handler, _: handler._send(200, {"Content-Type": "text/html"}, answer)  # noqa: E731
    monkeypatch.setattr(hub_server._Handler, "_api", send)
    for fetch in (sources.fetch_dataset, sources.fetch_model):
        with pytest.raises(UserError, match="cannot fetch laion/OIG: what answers is not the hub; check HF_ENDPOINT"):
            fetch("laion/OIG", ["*"], *([tmp_path] if fetch is sources.fetch_dataset else []), retry=retry)


@pytest.fixture
def away(oig, monkeypatch):
    """A call after which nobody answers in the hub's place."""
    import huggingface_hub.constants

    return lambda: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def test_files_that_are_here_need_no_hub(oig, away, tmp_path, retry, capsys):
    files = ["unified_ni", "more/unified_p3.jsonl"]
    found = sources.fetch_dataset("laion/OIG", files, tmp_path, retry=retry)
    away()
    assert set(sources.fetch_dataset("laion/OIG", files, tmp_path, retry=retry)) == set(found)
    assert f"(using what is in {tmp_path})" in capsys.readouterr().err
    # A glob, all, a file that never came and one that is gone do need it.
    found[0].unlink()
    for wanted in (["unified_*"], [], ["unified_ni"], ["more/unified_p3.jsonl", "README.md"]):
        with pytest.raises(UserError, match="cannot fetch laion/OIG: the hub cannot be reached; connect and run again"):
            sources.fetch_dataset("laion/OIG", wanted, tmp_path, retry=retry)
    assert [name for name in names(tmp_path) if name.endswith(".part")] == []


@pytest.mark.parametrize("keep_packed", [False, True])
def test_one_file_that_is_here_needs_no_hub(oig, away, tmp_path, retry, keep_packed):
    oig.add(OIG, {"deep/a.jsonl.gz": gzip.compress(b"{}\n")})
    address = "https://huggingface.co/datasets/laion/OIG/resolve/main/deep/a.jsonl.gz"
    found = sources.fetch_source(address, tmp_path, keep_packed=keep_packed, retry=retry)
    away()
    assert sources.fetch_source(address, tmp_path, keep_packed=keep_packed, retry=retry) == found
    assert found == [tmp_path / ("a.jsonl.gz" if keep_packed else "a.jsonl")]
    with pytest.raises(UserError, match="the hub cannot be reached"):
        sources.fetch_source(address.replace("/a.", "/b."), tmp_path, retry=retry)
