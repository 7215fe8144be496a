"""openchatkit/settings.py: dataclass fields as flags, as keys of a YAML file, and as a table."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from openchatkit import settings
from openchatkit.cli import positive_float, positive_int
from openchatkit.errors import UserError
from openchatkit.settings import SettingsParser, setting


@dataclass(frozen=True, kw_only=True)
class Where:
    title: ClassVar[str] = "where"
    folder: Path = setting(required=True, help="of the `run`")
    rank: int = setting(check=positive_int, help="not given: the command's choice")


@dataclass(frozen=True, kw_only=True)
class How:
    title: ClassVar[str] = "how much"
    lr: float = setting(1e-5, check=positive_float, help="100% of it; see `--half`")
    half: bool = setting(False, help="take half")
    steps: int | None = setting(None, check=positive_int, help="how many")
    epochs: int | None = setting(None, check=positive_int, help="instead of `--steps`")
    kind: str = setting("one", choices=("one", "two", "three"), help="which")
    names: str = setting("", help="a list")


@dataclass(frozen=True, kw_only=True)
class Both(Where, How):
    other: str = "no setting"


def read(*argv: object) -> dict[str, object]:
    parser = SettingsParser(
        Both,
        alternatives=[{"steps", "epochs"}],
        unlisted=["old_flag"],
        refused={"password": "no place for a secret"},
        prog="try.py",
    )
    return dict(parser.read([str(argument) for argument in argv]).values)


@pytest.fixture
def file(tmp_path):
    """Write a YAML file; returns its path."""

    def write(text: str, name: str = "run.yml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_only_what_is_given_is_read():
    assert read("--folder", "a") == {"folder": Path("a")}
    assert read("--folder", "a", "--half", "--lr", "2", "--old-flag", "7") == {
        "folder": Path("a"),
        "half": True,
        "lr": 2.0,
        "old_flag": "7",
    }
    assert read("--folder=a", "--half", "false")["half"] is False


def test_a_file_has_every_setting_as_a_key(file):
    path = file(
        "folder: a\nlr: 1e-3\nhalf: yes\nsteps: 007\nkind: two\nnames:\n  - x:1\n  - y\nepochs: null\nold-flag:\n"
    )
    given = read("--config", path)
    assert given == {"folder": Path("a"), "lr": 1e-3, "half": True, "steps": 7, "kind": "two", "names": "x:1,y"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n# nothing\n", "lr:\n", "lr: ~\n", "lr: null\n"])
def test_a_file_may_leave_everything_out(file, text):
    assert read("--config", file(text), "--folder", "a") == {"folder": Path("a")}


def test_the_command_line_wins_over_files_and_these_over_a_recipe(file):
    first, second = file("lr: 1\nkind: two\nfolder: f\n", "1.yml"), file("lr: 2\n", "2.yml")
    assert read("--lr", 3, "--config", first)["lr"] == 3
    assert read("--config", first, "--lr", 3)["lr"] == 3
    assert read("--config", first, "--config", second) == {"folder": Path("f"), "lr": 2, "kind": "two"}
    recipe = ["--folder", "r", "--lr", "5", "--kind", "three", "--half"]
    given = read(*recipe, "--overrides", "--config", first, "--half", "false")
    assert given == {"folder": Path("f"), "lr": 1, "kind": "two", "half": False}
    assert read(*recipe, "--overrides", "--lr", "6")["lr"] == 6


def test_of_alternatives_those_of_the_last_place_count(file):
    path = file("steps: 5\n")
    assert read("--folder", "a", "--epochs", 2, "--config", path) == {"folder": Path("a"), "epochs": 2}
    assert read("--folder", "a", "--epochs", 2, "--overrides", "--config", path) == {"folder": Path("a"), "steps": 5}
    assert read("--folder", "a", "--epochs", 2, "--steps", 3) == {"folder": Path("a"), "epochs": 2, "steps": 3}


def test_the_command_line_itself_is_told_from_files_and_recipes(file):
    parser = SettingsParser(Both, prog="try.py")
    assert set(parser.read(["--folder", "a", "--config", str(file("lr: 1"))]).last) == {"folder"}
    assert set(parser.read(["--folder", "a", "--overrides", "--lr", "1"]).last) == {"lr"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder: a\nlr: -1\n", "run.yml:2: argument --lr: expected a number of at least 0, got '-1'"),
        ("kind: four\n", "run.yml:1: argument --kind: invalid choice: 'four'"),
        ("half: maybe\n", "run.yml:1: argument --half: expected true or false, got 'maybe'"),
        ("steps: [1, 2]\n", "run.yml:1: argument --steps: expected a whole number of at least 1, got '1,2'"),
        ("\nflder: a\n", "run.yml:2: there is no setting 'flder': the nearest is 'folder'"),
        ("config: b.yml\n", "run.yml:1: there is no setting 'config': the nearest is "),
        ("lr: 1\nkind: one\nlr: 2\n", "run.yml:3: 'lr' is there twice: leave one out"),
        ("lr: null\nlr: 2\n", "run.yml:2: 'lr' is there twice: leave one out"),
        ("old-flag:\nold_flag:\n", "run.yml:2: 'old_flag' is there twice: leave one out"),
        ("\npassword: 1\n", "run.yml:2: --password: no place for a secret"),
        ("how:\n  lr: 1\n", "run.yml:1: expected a name and one value, or a list of values"),
        ("names: [{a: b}]\n", "run.yml:1: expected a name and one value, or a list of values"),
        ("? [a]\n: b\n", "run.yml:1: expected a name and one value, or a list of values"),
        ("- lr\n", "run.yml: expected lines such as `lr: 2e-5`, found something else"),
        ("lr: [1\n", "run.yml is not YAML: "),
        ("lr: 1\n---\nlr: 2\n", "run.yml is not YAML: "),
        ("lr: \0\n", "run.yml is not YAML: "),
        ("lr: !!python/object/apply:os.system [ls]\n", "--lr: expected a number of at least 0, got 'ls'"),
        ("[" * 5000, "run.yml is not YAML: "),
    ],
    ids=lambda value: value[:20].replace("\n", " "),
)
def test_a_mistake_in_a_file_is_one_line_that_says_where(file, text, message):
    with pytest.raises(UserError) as error:
        read("--folder", "a", "--config", file(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nold_flag: 'hunter2\n", "found unexpected end of stream in line 3"),
        ("lr: 1\nold_flag: hunter2: x\n", "mapping values are not allowed here in line 2"),
        ("lr: 1\nold_flag: {key: hunter2}\n", "run.yml:2: expected a name and one value"),
        ("old_flag: hunter2\nold_flag: hunter3\n", "run.yml:2: 'old_flag' is there twice"),
        ("password: hunter2\n", "run.yml:1: --password: no place for a secret"),
    ],
)
def test_a_mistake_in_a_file_repeats_none_of_it(file, text, message):
    with pytest.raises(UserError) as error:
        read("--folder", "a", "--config", file(text))
    assert message in str(error.value)
    assert "hunter" not in str(error.value)


@pytest.mark.parametrize(("name", "reason"), [("none.yml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"{reason}.*: expected a YAML file of settings"):
        read("--folder", "a", "--config", tmp_path / name)


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "run.yml").write_bytes("names: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.yml is not YAML: 'utf-8' codec"):
        read("--folder", "a", "--config", tmp_path / "run.yml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --folder"),
        (["--folder", "a", "--lr", "0"], "argument --lr: expected a number above 0"),
        (["--folder", "a", "--nothing"], "unrecognized arguments: --nothing"),
        (["--password", "hunter2", "--folder", "a"], "^--password: no place for a secret$"),
        (["--password", "--overrides", "--folder", "a"], "^--password: no place for a secret$"),
        (["--folder", "a", "--config"], "argument --config: expected one argument"),
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        read(*argv)


def test_help_has_groups_defaults_and_no_unlisted_flags():
    text = " ".join(SettingsParser(Both, unlisted=["old_flag"], prog="try.py").format_help().split())
    assert text.startswith("usage: try.py [--config FILE] --folder FOLDER [--FLAG VALUE ...]")
    assert text.index("where: ") < text.index("--rank") < text.index("how much: ") < text.index("--lr LR 100% of it;")
    assert "see --half (default: 1e-05)" in text
    assert "--kind {one,two,three} which (default: one)" in text
    assert "--half [true|false] take half --steps" in text
    assert "old-flag" not in text


def test_json_has_the_settings_alone():
    made = Both(folder=Path("a"), rank=3)
    assert list(settings.to_json(made)) == sorted(field.name for field in settings.fields(Both))
    assert settings.to_json(made) == {
        "epochs": None,
        "folder": "a",
        "half": False,
        "kind": "one",
        "lr": 1e-5,
        "names": "",
        "rank": 3,
        "steps": None,
    }
    assert dataclasses.replace(made, lr=2.0).lr == 2.0


def test_a_table_a_group():
    before, after = "# A title\n<!-- flags: by hand -->\n", "<!-- end of flags -->\nthe end\n"
    text = settings.update_table(f"{before}old\n{after}", Both)
    assert settings.update_table(text, Both) == text
    assert text.startswith(before)
    assert text.endswith(after)
    assert "### Where\n\n| flag | default | meaning |\n|-|-|-|\n| `--folder` | | of the `run` |\n" in text
    assert "| `--kind` | `one` | `one`, `two` or `three`: which |\n" in text
    assert "| `--lr` | `1e-05` | 100% of it; see `--half` |\n| `--half` | | take half |\n" in text
