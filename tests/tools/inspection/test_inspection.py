"""`tools.inspection` but its `verification`: tokens as they are trained on, figures that add up, escaped data."""

import html
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.tools.inspection import figures, page, sampled, terminal
from openchatkit.tools.inspection.command import main
from openchatkit.tools.inspection.sampled import Sample, Span, read_sample, visible

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


@pytest.fixture
def build(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Dataset, DataOptions]]:
    def build(task_names: str, **given: object) -> tuple[Dataset, DataOptions]:
        options = DataOptions(tiny_tokenizer, **{"seq_length": 64, "data_cache": tmp_path / "cache"} | given)
        return build_dataset(task_names, options), options

    return build


@pytest.fixture
def run(tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command on some flags: (exit status, what it printed)."""

    def run(*flags: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([*map(str, flags)])
        printed = capsys.readouterr()
        return end.value.code, printed.err if end.value.code else printed.out

    return run


def chats(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def row(tokens: list[int], labels: list[int], document_starts: list[int] | None = None) -> SimpleNamespace:
    """A data set of one sample."""
    places = None if document_starts is None else torch.tensor([document_starts])
    batch = Batch(0, torch.tensor([tokens]), torch.tensor([labels]), places, torch.tensor([0]))
    return SimpleNamespace(
        batch=lambda first, count: batch,
        interleaving=SimpleNamespace(locate=lambda number: (0, number)),
        sources=[SimpleNamespace(name="a.jsonl")],
    )


def spans(sample: Sample) -> list[tuple[str | None, bool]]:
    return [(span.text, span.trained) for span in sample.spans]


def test_a_label_belongs_to_the_token_after_it(tokenizer: Tokenizer) -> None:
    a, b, c, d = (ids[0] for ids in tokenizer.encode(["a", "b", "c", "d"]))
    sample = read_sample(row([a, b, c], [IGNORE, c, IGNORE]), 0, tokenizer)
    assert spans(sample) == [("ab", False), ("c", True)]
    assert (sample.length, sample.trained, sample.padding) == (3, 1, 0)
    # The last label's token is not in the row; the first token is predicted in no row that shows it.
    sample = read_sample(row([a, b, c], [b, c, d]), 0, tokenizer)
    assert spans(sample) == [("a", False), ("bcd", True)]
    assert sample.trained == 3


def test_a_document_shows_its_predicted_end_and_the_next_one_its_border(tokenizer: Tokenizer) -> None:
    a, b, c = (ids[0] for ids in tokenizer.encode(["a", "b", "c"]))
    end, pad = tokenizer.end_of_text, tokenizer.padding
    # Two documents: `ab` and its end, which is only predicted, and `ac`.
    sample = read_sample(row([a, b, a, c, pad], [b, end, c, IGNORE, IGNORE], [0, 0, 2, 2, 4]), 0, tokenizer)
    assert sample.spans == (
        Span("a", 1),
        Span("b", 1, trained=True),
        Span(END, 1, trained=True, special=True),
        Span("a", 1, border=True),
        Span("c", 1, trained=True),
    )
    assert sample.padding == 1
    # The next document begins with the very token that is predicted: still they are two.
    sample = read_sample(row([a, b], [b, IGNORE], [0, 1]), 0, tokenizer)
    assert [(span.text, span.trained, span.border) for span in sample.spans] == [
        ("a", False, False),
        ("b", True, False),
        ("b", False, True),
    ]


def test_end_of_text_that_also_pads_is_not_taken_for_padding(tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode(["a"])[0]
    end = tokenizer.end_of_text
    pads_with_end = SimpleNamespace(padding=end, end_of_text=end, decode=tokenizer.decode)
    sample = read_sample(row([a, end, end, end], [end, IGNORE, IGNORE, IGNORE]), 0, pads_with_end)
    assert (spans(sample), sample.padding) == ([("a", False), (END, True)], 2)
    # Where documents share a row their ends are only predicted.
    sample = read_sample(row([a, end, end], [end, IGNORE, IGNORE], [0, 1, 2]), 0, pads_with_end)
    assert (spans(sample), sample.padding) == ([("a", False), (END, True)], 2)


def test_a_character_cut_by_a_border_is_shown_where_it_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["é🦆"])[0]
    assert len(ids) == 6, "a token a byte"
    labels = [IGNORE, IGNORE, ids[3], ids[4], IGNORE, IGNORE]
    sample = read_sample(row(ids, labels), 0, tokenizer)
    assert spans(sample) == [("é", False), ("", True), ("🦆", False)]
    assert [span.tokens for span in sample.spans] == [3, 2, 1]
    # What is half a character in the data is shown as what it is.
    assert spans(read_sample(row(ids[1:4], [IGNORE] * 3), 0, tokenizer)) == [("\ufffd\ufffd", False)]


def test_special_tokens_are_told_from_text_that_spells_them(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode([END])[0], tokenizer.end_of_text]
    sample = read_sample(row(ids, [IGNORE] * len(ids)), 0, tokenizer)
    assert [(span.text, span.special) for span in sample.spans] == [(END, False), (END, True)]


def test_long_samples_lose_their_middle(tokenizer: Tokenizer) -> None:
    ids = [ids[0] for ids in tokenizer.encode([*"abcdefghijklmnopqrst"])]
    labels = [IGNORE, IGNORE, *ids[3:18], IGNORE, IGNORE, IGNORE]
    sample = read_sample(row(ids, labels), 0, tokenizer, ends=5)
    assert spans(sample) == [("abc", False), ("de", True), (None, False), ("pqr", True), ("st", False)]
    assert sum(span.tokens for span in sample.spans) == 20
    assert spans(read_sample(row(ids, labels), 0, tokenizer, ends=7))[1] == ("defghijklmnopqr", True)


def test_characters_that_control_hide_or_reorder_are_spelled_out() -> None:
    text = "a\x1b[31m\x9b2J\x07\t\r\x00\x7f\u202e\u200b\u2028\ud800\n¡é日本語🦆"
    assert visible(text) == "a␛[31m<U+009B>2J␇␉␍␀␡<U+202E><U+200B><U+2028><U+D800>\n¡é日本語🦆"


def test_samples_are_drawn_from_the_sources_in_turns(build: Callable[..., tuple], tmp_path: Path) -> None:
    names = [chats(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(200)]) for name in "abc"]
    dataset, _ = build(f"{names[0]}:100,{names[1]}:10,{names[2]}:10")
    numbers = sampled.choose(dataset, 5_000, 6, seed=1)
    assert numbers == sorted(set(numbers)) == sampled.choose(dataset, 5_000, 6, seed=1)
    assert Counter(dataset.interleaving.locate(number)[0] for number in numbers) == {0: 2, 1: 2, 2: 2}
    assert numbers != sampled.choose(dataset, 5_000, 6, seed=2)
    assert sampled.choose(dataset, 4, 6, seed=1) == [0, 1, 2, 3]


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_figures_are_what_the_samples_hold(
    build: Callable[..., tuple], tokenizer: Tokenizer, tmp_path: Path, packing: str, loss_on: str
) -> None:
    a = chats(tmp_path / "a.jsonl", [f"<human>: What is {n}?\n<bot>: It is {n}.\n" for n in range(90)])
    b = chats(tmp_path / "b.jsonl", [f"<human>: Who?\n<bot>: {'the answer ' * (n % 7)}\n" for n in range(60)])
    dataset, options = build(f"{a}:3,{b}:1", packing=packing, loss_on=loss_on)
    steps = 120
    mixture = figures.mixture(dataset, options, steps=steps, batch_size=8, draw=1000)
    batch = dataset.batch(0, steps * 8)
    counts = Counter(batch.sources.tolist())
    trained = [int((batch.labels[batch.sources == source] != IGNORE).sum()) for source in range(2)]
    for number, source in enumerate(mixture.sources):
        assert source.samples == counts[number]
        assert source.sequences == pytest.approx((0.75, 0.25)[number], abs=1e-3)
        own = dataset.sources[number]
        epochs = (
            counts[number] * 64 / own.tokens if packing == "concat" else counts[number] / dataset.packed[number].samples
        )
        assert source.epochs == pytest.approx(epochs)
        assert source.loss == pytest.approx(trained[number] / sum(trained), abs=0.02)
        assert source.rows == source.documents == (90, 60)[number]
    assert mixture.trained == pytest.approx(sum(trained) / batch.labels.numel(), abs=0.02)
    assert mixture.drawn == (0 if packing == "concat" else 1000)
    padding = [read_sample(dataset, number, tokenizer).padding for number in range(200)]
    if packing == "concat":
        assert mixture.waste == 0 == sum(padding)
    else:
        assert mixture.waste == pytest.approx(sum(padding) / len(padding) / 64, abs=0.06)


@pytest.mark.parametrize("packing", ["concat", "overflow"])
def test_figures_in_gpt_neox_s_order(build: Callable[..., tuple], tmp_path: Path, packing: str) -> None:
    a = chats(tmp_path / "a.jsonl", [f"What is {n}? It is {n}.\n" for n in range(90)])
    b = chats(tmp_path / "b.jsonl", [f"Who? {'the answer ' * (n % 7)}\n" for n in range(60)])
    order = {"data_order": "neox", "wanted": 320, "rows": 8, "mask_end_of_text": True}
    dataset, options = build(f"{a}:3,{b}:1", packing=packing, **order)
    mixture = figures.mixture(dataset, options, steps=40, batch_size=8, draw=1000)
    batch = dataset.batch(0, 320)
    trained = [int((batch.labels[batch.sources == source] != IGNORE).sum()) for source in range(2)]
    assert [source.samples for source in mixture.sources] == [240, 80]
    for source, own, count in zip(mixture.sources, dataset.sources, trained, strict=True):
        assert source.loss == pytest.approx(count / sum(trained), abs=0.01)
        if packing == "concat":
            assert source.epochs == pytest.approx(source.samples * 64 / own.tokens, rel=0.01)
    assert mixture.trained == pytest.approx(sum(trained) / batch.labels.numel(), rel=0.01)


def test_every_sample_reads_as_its_documents(build: Callable[..., tuple], tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = {f"<human>: What is {n} 🦆?\n<bot>: It is {n}.\n" for n in range(30)}
    dataset, _ = build(str(chats(tmp_path / "a.jsonl", sorted(texts))), packing="documents", loss_on="responses")
    seen = Counter()
    for number in range(dataset.packed[0].samples):
        sample = read_sample(dataset, number, tokenizer)
        documents = "".join(("\0" if span.border else "") + span.text for span in sample.spans).split("\0")
        seen.update(text.removesuffix(END) for text in documents)
        for span in sample.spans:
            assert span.trained == bool(span.special or re.fullmatch(r" It is \d+\.\n", span.text)), span
    assert seen == dict.fromkeys(texts, 1)


def test_a_pipe_gets_plain_text_with_a_mark_on_every_line(
    run: Callable[..., tuple], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    text = f"<human>: Hi \x1b[2J[bold]red[/bold] :smile: {END}?\n<bot>: Yes.\nNo.\n"
    path = chats(tmp_path / "a.jsonl", [text])
    flags = ["--task-name", path, "--tokenizer-name", tiny_tokenizer, "--data-cache", tmp_path / "cache"]
    status, printed = run(
        *flags, *("--seq-length", 128, "--packing", "none", "--loss-on", "responses", "--samples", 1, "--first", 0)
    )
    assert status == 0
    assert "\x1b" not in printed
    title, *lines = printed.splitlines()[-7:]
    assert re.fullmatch(rf"sample 0 of {path}: \d+ of 128 tokens trained on", title)
    assert lines[:5] == [
        f".  <human>: Hi ␛[2J[bold]red[/bold] :smile: {END}?↵",
        ".  <bot>:",
        "+   Yes.↵",
        "+  No.↵",
        f"+# {END}",
    ]
    assert re.fullmatch(r"   \.\.\. \d+ tokens of padding", lines[5])


def test_a_terminal_gets_colour_and_a_mark_on_every_folded_line() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=30, color_system="standard", markup=False)
    text = "one two three four five six seven eight nine ten eleven twelve\n"
    terminal.show_samples(out, [Sample(7, "a", 3, 9, 9, 0, (Span(text, 9, trained=True), Span(None, 40)))])
    printed = out.file.getvalue()
    assert "\x1b[1;32m" in printed
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    lines = plain.split("sample 7, number 3 of a: 9 of 9 tokens trained on\n")[1].splitlines()
    folded = [line for line in lines if line.startswith("+  ")]
    assert [line.rstrip() for line in folded] == [
        "+  one two three four five six",
        "+  seven eight nine ten eleven",
        "+  twelve↵",
    ]
    assert " ".join(lines[3:]).split() == ["...", "40", "tokens", "left", "out", "(--full", "shows", "them)"]


def test_a_closed_pipe_is_left_to_the_command() -> None:
    with pytest.raises(BrokenPipeError):
        terminal.console().on_broken_pipe()


def test_the_tables_fit_a_narrow_window(
    run: Callable[..., tuple], tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 10)
    folder.mkdir()
    path = chats(folder / "a.jsonl", ["<human>: Hi\n<bot>: Yes\n"] * 60)
    flags = ["--task-name", path, "--tokenizer-name", tiny_tokenizer, "--data-cache", tmp_path / "cache"]
    monkeypatch.setenv("COLUMNS", "80")
    status, printed = run(*flags, "--seq-length", 32, "--samples", 0, "--total-steps", 50, "--batch-size", 2)
    assert status == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert [line.split()[1:] for line in printed.splitlines() if "a.jsonl" in line] == [
        ["60", "0", "60", "900", "100.0%"],
        ["1", "100.0%", "100", "3.56", "100.0%", "0.0%"],
    ]
    assert "50 steps of 2 sequences of 32 tokens" in printed


def test_rows_set_aside_are_listed(
    run: Callable[..., tuple], tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # so that no path, however long, is folded
    path = chats(tmp_path / "a.jsonl", ["<human>: Hi\n<bot>: Yes\n"] * 30)
    with open(path, "a") as file:
        file.write("{\n" * 7)
    flags = ["--task-name", path, "--tokenizer-name", tiny_tokenizer, "--data-cache", tmp_path / "cache"]
    status, printed = run(*flags, "--seq-length", 32, "--bad-rows", "quarantine", "--html", tmp_path / "page.html")
    assert status == 0
    assert f"{path}: 7 rows set aside, listed in {tmp_path / 'cache'}" in " ".join(printed.split())
    assert f"  {path}:31: " in printed
    assert f"{path}:35: " in printed
    assert f"{path}:36: " not in printed
    assert "and 2 more" in printed
    assert "and 2 more" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_escapes_all_data(run: Callable[..., tuple], tiny_tokenizer: Path, tmp_path: Path) -> None:
    text = "<human>: <script>alert('&')</script>\n<bot>: </pre>\x1b\u202e🦆\n"
    path = chats(tmp_path / "a<b>.jsonl", [text] * 9)
    flags = ["--task-name", path, "--tokenizer-name", tiny_tokenizer, "--data-cache", tmp_path / "cache"]
    where = tmp_path / "page.html"
    status, printed = run(
        *flags, "--html", where, "--loss-on", "responses", "--packing", "documents", "--seq-length", 200
    )
    assert status == 0
    assert f"{where} shows the same as a page" in printed
    shown = where.read_text(encoding="utf-8")
    for never in ("<script", "</pre>\u2423", "\x1b", "\u202e", "a<b>", "http://", "https://", "src=", "{{", "{%"):
        assert never not in shown
    assert "<b> &lt;/pre&gt;␛&lt;U+202E&gt;🦆↵\n</b>" in shown
    assert html.escape("<script>alert('&')</script>↵") in shown.replace("&#39;", "&#x27;")
    assert shown.count("<section>") == 3
    assert "<hr>" in shown
    assert sorted(entry for entry in os.listdir(tmp_path) if "html" in entry) == ["page.html"]


def test_only_zero_shows_as_zero() -> None:
    assert [terminal.percent(share) for share in (0, 0.0001, 0.0005, 0.5, 1)] == [
        "0.0%",
        "<0.1%",
        "0.1%",
        "50.0%",
        "100.0%",
    ]
    assert [terminal.number(value) for value in (0, 0.00123, 0.1, 64.556, 1234.5)] == [
        "0.00",
        "0.0012",
        "0.10",
        "64.56",
        "1,234.50",
    ]


def test_a_page_of_one_source_names_it_once_a_bar() -> None:
    source = figures.SourceFigures("a", 1.0, 9, 0, 9, 90, 45, 1.0, 32, 2.0, 10.0, 5.0, 1.0, 0.25)
    mixture = figures.MixtureFigures((source,), 16, 1, 32, 8)
    shown = page.render(mixture, [], [])
    assert shown.count('title="a: 100.0%"') == 2
    assert "1 step of 32 sequences of 16 tokens. 31.2% of all places" in shown
    assert "estimated from 8 samples of each source" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--task-name is missing: give the one that training is given"),
        (["--task-name", "a.jsonl"], "--tokenizer-name is missing"),
        (["--task-name", "a", "--tokenizer-name", "b", "--html", "/"], "--html / is a folder: give the file to write"),
        (["--verify"], "--verify needs --checkpoint-path"),
        (["--checkpoint-path", "x"], "--checkpoint-path goes with --verify, --step or --jumps alone"),
        (["--step", "3"], "--step needs --checkpoint-path"),
        (["--jumps"], "--jumps needs --checkpoint-path"),
        (["--step", "3", "--jumps", "--checkpoint-path", "x"], "--step and --jumps exclude each other: give one"),
        (["--jumps", "--full", "--checkpoint-path", "x"], "--full does not go with --jumps"),
        (
            ["--jumps", "--checkpoint-path", "no/such"],
            "no/such has no metrics.jsonl: expected the",
        ),
        (["--verify", "--checkpoint-path", "x", "--task-name", "a"], "--task-name does not go with --verify"),
        (["--verify", "--checkpoint-path", "no/such"], "no/such holds no checkpoint: found no such folder"),
        (["--samples", "-1"], "expected a whole number of at least 0"),
    ],
)
def test_mistakes_get_one_line(run: Callable[..., tuple], flags: list[str], message: str) -> None:
    status, printed = run(*flags)
    assert status == 2
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_a_file_of_settings_is_read(run: Callable[..., tuple], tiny_tokenizer: Path, tmp_path: Path) -> None:
    data = chats(tmp_path / "a.jsonl", ["one two three", "four five six"])
    file = tmp_path / "run.yml"
    file.write_text(
        f"task_name: {data}\ntokenizer_name: {tiny_tokenizer}\nseq_length: 16\nsamples: 1\nfull: yes\n"
        f"data_cache: {tmp_path / 'cache'}\n",
        encoding="utf-8",
    )
    flags = f"--task-name {data} --tokenizer-name {tiny_tokenizer} --seq-length 16 --samples 1 --full"
    assert run("--config", file) == run(*flags.split(), "--data-cache", tmp_path / "cache")
