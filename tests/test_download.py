"""Fetching models: folders are taken as they are, and every way the hub can refuse is one line with what to do."""

import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from openchatkit.download import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats import hf_model

SMALL, SAFE, PICKLED = ["config.json"], ["model.safetensors"], ["pytorch_model.bin"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the files in `hub.files`; `hub.asked` are the patterns it was asked for."""

    class Hub:
        files = ("config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "flax_model.msgpack")
        asked: list = []  # noqa: RUF012

        def download(self, name, *, allow_patterns):
            self.asked = [*self.asked, allow_patterns]
            for file in self.files:
                if any(Path(file).match(pattern) for pattern in allow_patterns):
                    (tmp_path / file).write_text(name)
            return str(tmp_path)

    made = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_a_folder_is_its_own_model(tmp_path, monkeypatch):
    assert fetch_model(str(tmp_path), SMALL, SAFE) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert fetch_model("~/mine", SMALL) == tmp_path / "mine"


def test_pickles_are_left_on_the_hub_where_there_are_safetensors(hub):
    folder = fetch_model("org/model", SMALL, SAFE, PICKLED)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_pickles_are_fetched_where_there_is_nothing_else(hub):
    hub.files = ("config.json", "pytorch_model.bin", "modeling_x.py")
    folder = fetch_model("org/model", SMALL, SAFE, PICKLED)
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}


def test_config_and_tokenizer_alone(hub):
    folder = hf_model.fetch("org/model", weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    assert len(hub.asked) == 1
    assert not any(pattern.endswith((".py", "*")) for pattern in hub.asked[0])


@pytest.mark.parametrize("name", ["./model", "/no/where", "~/model", "a/b/c", "gpt2"])
def test_no_folder_and_no_hub_name(name):
    message = f"{name}: no such folder; pass a folder or a hub name such as EleutherAI/pythia-1.4b"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        fetch_model(name, SMALL)


class Response:
    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 401


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.LocalEntryNotFoundError("offline"),
            "the hub cannot be reached and it is not in the cache; connect and",
        ),
        (
            errors.RepositoryNotFoundError("401", response=Response()),
            "knows no such model; check the spelling, or set HF",
        ),
        (errors.GatedRepoError("403", response=Response()), "asks for its licence to be accepted; accept it there and"),
        (errors.HFValidationError("bad"), "no hub name; expected ORG/NAME or a folder"),
        (errors.HfHubHTTPError("500", response=Response()), "the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=f"^cannot fetch org/model: .*{re.escape(message)}"):
        fetch_model("org/model", SMALL)
