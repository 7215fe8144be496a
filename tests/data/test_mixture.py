"""`data.mixture`: the entries of `--task-name`, and exact quotas."""

import random
from collections import Counter
from pathlib import Path

import pytest

from openchatkit import paths
from openchatkit.data.mixture import CYCLE, Interleaving, apportion, parse
from openchatkit.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a few files of records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in (
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d:2.jsonl",
        "sub/1.jsonl",
        "sub/2.jsonl",
        "sub/note.txt",
        "store.idx",
        "store.bin",
    ):
        (tmp_path / name).touch()
    return tmp_path


def names(text: str) -> list[tuple[str, list[str], float]]:
    return [
        (part.name, [str(path) for path in (*part.files, *part.stores)], part.weight)
        for part in parse(text, cache_dir=Path("cache"))
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", ["a.jsonl"], 1.0)]),
        ("a.jsonl:0.2", [("a.jsonl", ["a.jsonl"], 0.2)]),
        (" a.jsonl:1e-1 ,\n b.jsonl.gz:3,", [("a.jsonl", ["a.jsonl"], 0.1), ("b.jsonl.gz", ["b.jsonl.gz"], 3.0)]),
        ("b.jsonl:2,c.jsonl", [("b.jsonl", ["b.jsonl.gz"], 2.0), ("c.jsonl", ["c.jsonl.zst"], 1.0)]),
        ("d:2.jsonl", [("d:2.jsonl", ["d:2.jsonl"], 1.0)]),
        ("d:2.jsonl:2", [("d:2.jsonl", ["d:2.jsonl"], 2.0)]),
        ("sub/*.jsonl:0.5", [("sub/*.jsonl", ["sub/1.jsonl", "sub/2.jsonl"], 0.5)]),
        ("**/1.jsonl", [("**/1.jsonl", ["sub/1.jsonl"], 1.0)]),
        ("store", [("store", ["store"], 1.0)]),
        ("store.idx:2,store.bin:3", [("store.idx", ["store"], 2.0), ("store.bin", ["store"], 3.0)]),
        ("sto*:2", [("sto*", ["store"], 2.0)]),
    ],
)
def test_parse(text: str, expected: list[tuple[str, list[str], float]]) -> None:
    assert names(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--task-name names no data: expected name\[:weight\],name\[:weight\]"),
        (" , ", "--task-name names no data"),
        ("a.jsonl:", "--task-name: a.jsonl has the weight '': expected a number above 0"),
        ("a.jsonl:x", "--task-name: a.jsonl has the weight 'x': expected a number above 0"),
        ("a.jsonl:0", "a.jsonl has the weight '0'"),
        ("a.jsonl:-1", "a.jsonl has the weight '-1'"),
        ("a.jsonl:nan", "a.jsonl has the weight 'nan'"),
        ("a.jsonl:inf", "a.jsonl has the weight 'inf'"),
        ("cat", r"no file cat \(\. holds a.jsonl, b.jsonl.gz, c.jsonl.zst, d:2.jsonl\)$"),
        (
            "cot:2",
            r"cot is not here yet: run `python data/OIG/prepare.py --files unified_mathqa_flanv2_kojma_cot` first",
        ),
        ("unified_ni", r"unified_ni is not here yet: run `python data/OIG/prepare.py --files unified_ni` first"),
        ("a.jsonl,z.jsonl:2", r"no file z.jsonl \(\. holds"),
        ("z.jsonl:two", r"no file z.jsonl:two \("),
        (":1", r"no file :1 \("),
        ("x" * 300, "--task-name: x{300}: File name too long"),
        ("nowhere/z.jsonl", r"no file nowhere/z.jsonl \(there is no folder nowhere\)$"),
        ("sub/*.gz:2", r"no file sub/\*.gz \(sub holds 1.jsonl, 2.jsonl\)$"),
        ("sub", r"sub is a folder: pass its files, for example sub/\*.jsonl"),
        ("https://example.org/a.jsonl:0", "https://example.org/a.jsonl has the weight '0'"),
        ("[as]*", r"\[as\]\* matches files of records and token stores: expected one kind"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text, cache_dir=Path("cache"))


def test_the_flag_is_named() -> None:
    with pytest.raises(UserError, match=r"--evaluation-data: a.jsonl has the weight"):
        parse("a.jsonl:x", cache_dir=Path("cache"), flag="--evaluation-data")


def test_many_files_are_not_all_listed(here: Path) -> None:
    for number in range(7):
        (here / "sub" / f"x{number}.jsonl").touch()
    with pytest.raises(UserError, match=r"sub holds 1.jsonl, 2.jsonl, x0.jsonl, x1.jsonl, x2.jsonl and 4 more\)"):
        parse("sub/z.jsonl", cache_dir=here)


def test_missing_files_of_ours_name_the_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ROOT", here)
    (here / "data" / "OIG").mkdir(parents=True)
    (here / "data" / "OIG" / "prepare.py").touch()
    for name in ("data/OIG/files/unified_ni.jsonl:0.2", str(here / "data/OIG/files/unified_ni.jsonl:0.2")):
        with pytest.raises(UserError, match=r": run `python data/OIG/prepare.py` first$"):
            parse(name, cache_dir=here)
    with pytest.raises(UserError, match=r"there is no folder data/Other/files\)$"):
        parse("data/Other/files/unified_ni.jsonl", cache_dir=here)


def test_largest_remainder() -> None:
    assert apportion([1], 7) == [7]
    assert apportion([1, 1, 1], 7) == [3, 2, 2]
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportion([6.0, 2.6, 1.4], 10) == [6, 3, 1]
    assert apportion([1000, 1, 1], 10) == [8, 1, 1]
    with pytest.raises(UserError, match="names 3 sources: expected at most 2"):
        apportion([1, 1, 1], 2)


def test_quotas_of_random_weights() -> None:
    generator = random.Random(0)
    for _ in range(50):
        weights = [generator.random() ** 4 + 1e-9 for _ in range(generator.randint(1, 40))]
        quotas = apportion(weights, CYCLE)
        assert sum(quotas) == CYCLE
        assert min(quotas) >= 1
        lent = sum(weight / sum(weights) * CYCLE < 1 for weight in weights)
        for quota, weight in zip(quotas, weights, strict=True):
            assert quota == 1 or abs(quota - weight / sum(weights) * CYCLE) < 1 + lent


def test_turns_are_counted() -> None:
    """Sample numbers of each source go up by one, from nought, across cycles, and quotas are exact."""
    turns = Interleaving.by_weight([0.2, 0.5, 0.001, 1.3], seed=3)
    given = Counter()
    for n in range(3 * CYCLE):
        source, number = turns.locate(n)
        assert number == given[source]
        given[source] += 1
    assert [given[source] for source in range(4)] == [3 * quota for quota in turns.quotas]
    assert [turns.locate(n) for n in range(CYCLE, CYCLE + 5)] == [
        (source, number + turns.quotas[source]) for source, number in (turns.locate(n) for n in range(5))
    ]


def test_a_short_run_meets_the_weights() -> None:
    for seed in range(5):
        turns = Interleaving.by_weight([1, 2, 5], seed=seed)
        for length in (80, 800, 5000):
            given = Counter(turns.locate(n)[0] for n in range(length))
            for source, weight in enumerate([1, 2, 5]):
                assert abs(given[source] - length * weight / 8) <= 3


@pytest.mark.parametrize("samples", [[400, 8], [1, 1], [3, 70_000, 2_000], [5]])
def test_whole_epochs(samples: list[int]) -> None:
    """Every epoch has each sample of each source once, and the smallest source is spread over it."""
    turns, total = Interleaving.by_quota(samples, seed=1), sum(samples)
    for epoch in range(2):
        found = [turns.locate(n) for n in range(epoch * total, (epoch + 1) * total)]
        for source, count in enumerate(samples):
            numbers = [number for place, number in found if place == source]
            assert numbers == list(range(epoch * count, (epoch + 1) * count))
    for n in (0, 1, total // 2, total, total + 1, 3 * total - 1):
        given = Counter(turns.locate(each)[0] for each in range(n))
        assert turns.counts(n) == [given[source] for source in range(len(samples))]


def test_the_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        turns = Interleaving.by_weight([1, 1], seed=seed)
        return [turns.locate(n)[0] for n in range(100)]

    assert order(1)[:16] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("path", "entry", "weight"),
    [
        ("a,b.jsonl", "{}", 1.0),
        ("a,b.jsonl", "{}:2", 2.0),
        ("[v2]/rows.jsonl", "{}", 1.0),
        ("[v2]/rows.jsonl", "[v2]/*.jsonl", 1.0),
        ("[v2]/x,y/1.jsonl", "[v2]/x,y/1.jsonl:0.5", 0.5),
    ],
)
def test_names_with_commas_and_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, entry: str, weight: float
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (path, "other.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    first, second = parse(f"{entry.format(path)}, other.jsonl", cache_dir=tmp_path)
    assert (first.files, first.weight) == ((Path(path),), weight)
    assert second.files == (Path("other.jsonl"),)


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "a.jsonl").touch()
    assert [part.files for part in parse("~/a.jsonl:2,~/*.jsonl", cache_dir=tmp_path)] == [(home / "a.jsonl",)] * 2
