"""Chatting with a 124 M GPT-NeoX on the CPU, against transformers: python benchmarks/chat.py

Prints four tables. The first is of decoding: how long a prompt of 256 tokens takes to its first new token, and tokens a
second behind it (the best of `--repeat` runs taken in turns), as a share of what the memory's bandwidth allows;
perplexity on text that the model was not trained on, and whether greedy text equals that of generate() in the same
precision (in bfloat16 for int8). The limit is bandwidth / (bytes of weights + bytes of keys and values, read for each
token): linear layers once, 2 x layers x width numbers for each token so far. The bandwidth is that of summing a large
array, on the same threads in the same run. A bare loop over transformers' model and its DynamicCache is there for
comparison, and llama.cpp where it is installed (pip install llama-cpp-python gguf).

The second is of the first token of the n-th turn, with what was read kept and without. The third is of loading against
reading the file, from the system's page cache and after it was told to drop the file. The fourth, with `--http`, asks
`transformers serve`, which is what `transformers chat` talks to, and inference/server.py through the OpenAI client.
"""

import argparse
import contextlib
import gc
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import _llama_peer
import torch
import transformers
from _chat_model import model_folder, sources
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats.chat_file import HOME_VARIABLE, home
from openchatkit.formats.hf_model import WEIGHTS
from openchatkit.inference.engine.engine import Engine, Statistics
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.loading import loader
from openchatkit.paths import ROOT

# A contestant: prompt -> the times at which it began and each new token came, and the tokens.
Decode = Callable[[Sequence[int]], tuple[list[float], list[int]]]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
HELD_OUT_ROWS, HELD_OUT_LENGTH = 8, 512
QUESTION = 40  # tokens of a turn's question, in the second table
REPLY = 92


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    loader.silence_libraries()
    # What the kit keeps for its user is to stay as it is.
    os.environ[HOME_VARIABLE] = str(options.folder / "home")
    folder = model_folder(
        options.folder,
        layers=options.layers,
        width=options.width,
        seconds=options.train_seconds,
        tied=not options.untied,
    )
    tokenizer = Tokenizer(folder)
    held_out = [token for ids in tokenizer.encode(sources(held_out=True)) for token in ids]
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads; ",
        end="",
    )
    print(f"{options.layers} layers of {options.width}, trained for {options.train_seconds:g} s\n", flush=True)
    loading(folder, options)
    decoding(folder, held_out, options)
    turns(folder, held_out, options)
    if options.http:
        over_http(folder, tokenizer, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "openchatkit-benchmark-chat"
    parser.add_argument("--folder", type=Path, default=default, help=f"where the model is kept ({default})")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--train-seconds", type=float, default=120, help="0 leaves the weights random")
    parser.add_argument("--untied", action="store_true", help="an output layer of its own")
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--http", action="store_true", help="also ask the servers")
    return parser.parse_args()


def table(*columns: str) -> Callable[..., None]:
    """Print the head of a table; the function that prints a row of it."""
    print("| " + " | ".join(columns) + " |\n|" + "-|" * len(columns), flush=True)
    return lambda *cells: print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# -- decoding


def decoding(folder: Path, held_out: Sequence[int], options: argparse.Namespace) -> None:
    """The first table."""
    contestants = make_contestants(folder, options.new_tokens)
    prompt = held_out[: options.prompt_tokens]
    reading = dict.fromkeys(contestants, float("inf"))
    best = dict.fromkeys(contestants, 0.0)
    texts: dict[str, list[int]] = {}
    for _ in range(options.repeat):
        for name, (_, decode) in contestants.items():
            times, texts[name] = decode(prompt)
            reading[name] = min(reading[name], times[1] - times[0])
            best[name] = max(best[name], (len(times) - 2) / (times[-1] - times[1]))
    rate = bandwidth()
    print(f"memory is read at {rate / 1e9:.1f} GB/s")
    read = f"reading {len(prompt)} tokens"
    row = table("what", "precision", read, "tokens/s", "limit", "of it", "perplexity", "greedy text of generate()")
    for name, (model, _) in contestants.items():
        what, precision = name
        bound = rate / bytes_per_token(contestants, name, len(prompt) + options.new_tokens / 2)
        expected = texts[_GENERATE, "float32" if precision == "float32" else "bfloat16"]
        row(
            what,
            precision,
            f"{1e3 * reading[name]:.0f} ms",
            f"{best[name]:.1f}",
            f"{bound:.0f}",
            f"{best[name] / bound:.0%}",
            "" if model is None else f"{perplexity(model, held_out):.2f}",
            agreement(texts[name], expected),
        )
    print()


_GENERATE, _BARE, _ENGINE, _LLAMA = "generate()", "bare loop, DynamicCache", "this engine", "llama.cpp"


Contestants = dict[tuple[str, str], tuple[PreTrainedModel | None, Decode]]


def make_contestants(folder: Path, new_tokens: int) -> Contestants:
    """By name and precision: the model, if it is one of transformers', and how it decodes."""
    made: Contestants = {}
    for dtype, name in NAMES.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        made[_GENERATE, name] = model, lambda prompt, model=model: with_generate(model, prompt, new_tokens)
        made[_BARE, name] = model, lambda prompt, model=model: with_bare_loop(model, prompt, new_tokens)
    for name in ("float32", "bfloat16", "int8"):
        loaded = loader.load(str(folder), dtype=name)
        made[_ENGINE, name] = loaded.model, lambda prompt, loaded=loaded: with_engine(loaded, prompt, new_tokens)
    if missing := _llama_peer.missing():
        print(f"llama.cpp takes no part: {', '.join(missing)} is not installed\n")
        return made
    for name in _llama_peer.PRECISIONS:
        made[_LLAMA, name] = None, _llama_peer.decoder(folder, name, new_tokens)
    return made


class Clock(BaseStreamer):
    """Notes when generate() has each token; what comes first is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def with_generate(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> tuple[list[float], list[int]]:
    ids, clock = torch.tensor([prompt]), Clock()
    asked = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "streamer": clock}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    return clock.times, output[0, len(prompt) :].tolist()


@torch.inference_mode()
def with_bare_loop(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> tuple[list[float], list[int]]:
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
    times, tokens = [time.perf_counter()], []
    for _ in range(new_tokens):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        times.append(time.perf_counter())
        ids = torch.tensor([tokens[-1:]])
    return times, tokens


def with_engine(loaded: loader.LoadedModel, prompt: Sequence[int], new_tokens: int) -> tuple[list[float], list[int]]:
    """With an engine of its own, since one keeps what it has read."""
    engine = Engine(loaded.model, eos_ids=(), device=loaded.device, cache_dtype=loaded.cache_dtype)
    times, tokens = [time.perf_counter()], []
    for token in engine.generate(prompt, Sampling(max_tokens=new_tokens, sample=False)):
        times.append(time.perf_counter())
        tokens.append(token)
    return times, tokens


def bandwidth() -> float:
    """Bytes a second that the threads read of an array of a GiB; the best of 7."""
    array = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - started)
    return array.nbytes / best


def bytes_per_token(contestants: Contestants, name: tuple[str, str], tokens_so_far: float) -> float:
    """The weights of the linear layers, and keys and values of the text so far, in the bytes that each is kept in."""
    what, precision = name
    config: GPTNeoXConfig = contestants[_GENERATE, "float32"][0].config
    layers, width = config.num_hidden_layers, config.hidden_size
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size) + width * config.vocab_size
    own = {"float32": 4, "bfloat16": 2, "int8": 1}.get(precision)
    weight = _llama_peer.PRECISIONS[precision][1] if what == _LLAMA else own
    cached = {_LLAMA: _llama_peer.CACHED_BYTES, _ENGINE: 4}.get(what, own)
    return weights * weight + 2 * layers * width * tokens_so_far * cached


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: Sequence[int]) -> float:
    """exp of the mean loss over rows of the text."""
    size = HELD_OUT_ROWS * HELD_OUT_LENGTH
    rows = torch.tensor(tokens[-size:]).view(HELD_OUT_ROWS, 1, HELD_OUT_LENGTH)
    return torch.stack([model(input_ids=row, labels=row).loss.float() for row in rows]).mean().exp().item()


def agreement(tokens: Sequence[int], expected: Sequence[int]) -> str:
    """Whether two texts are equal, or else where they part."""
    differing = [number for number, pair in enumerate(zip(tokens, expected, strict=True), 1) if pair[0] != pair[1]]
    return f"parts at token {differing[0]}" if differing else "equal"


# -- turns


def turns(folder: Path, held_out: Sequence[int], options: argparse.Namespace) -> None:
    """The second table. Questions are pieces of held-out text; replies are the model's own."""
    loaded = loader.load(str(folder), dtype="bfloat16")

    def first_token(engine: Engine) -> tuple[float, list[int]]:
        statistics = Statistics()
        sampling = Sampling(max_tokens=REPLY, sample=False)
        reply = list(engine.generate(conversation, sampling, statistics=statistics))
        return statistics.first_token_seconds, reply

    def new_engine() -> Engine:
        return Engine(loaded.model, eos_ids=(), device=loaded.device, cache_dtype=loaded.cache_dtype)

    row = table("turn", "tokens so far", "first token, kept", "first token, read again", "kept / again")
    kept, conversation = new_engine(), []
    for turn in range(1, options.turns + 1):
        conversation = [*conversation, *held_out[turn * QUESTION : (turn + 1) * QUESTION]]
        again = min(first_token(new_engine())[0] for _ in range(options.repeat))
        seconds, reply = first_token(kept)
        row(turn, len(conversation), f"{1e3 * seconds:.0f} ms", f"{1e3 * again:.0f} ms", f"{seconds / again:.2f}")
        conversation = conversation + reply
    print()


# -- loading


def loading(folder: Path, options: argparse.Namespace) -> None:
    """The table of loading. It comes first: while a model maps the file, the system does not drop it."""
    path = folder / WEIGHTS
    loader.load(str(folder))  # what the libraries import with the first model is no part of it
    row = table("what", "file in the page cache", "against reading", "file dropped from it", "against reading")
    reading = [best_of(options.repeat, lambda: read_file(path), path, drop=drop) for drop in (False, True)]
    row("reading the file", f"{reading[0]:.2f} s", "", f"{reading[1]:.2f} s", "")
    for what, dtype, again in (
        ("loading it in bfloat16", "bfloat16", False),
        ("quantising it to int8", "int8", True),
        ("loading what was kept of that", "int8", False),
        ("loading it in float32", "float32", False),
    ):
        cells = []
        for drop, read in zip((False, True), reading, strict=True):

            def load(dtype: str = dtype, again: bool = again) -> object:
                if again:
                    shutil.rmtree(home() / "cache", ignore_errors=True)
                return loader.load(str(folder), dtype=dtype)

            seconds = best_of(options.repeat, load, path, drop=drop)
            cells += [f"{seconds:.2f} s", f"{seconds / read:.2f}"]
        row(what, *cells)
    print()


def best_of(repeat: int, action: Callable[[], object], path: Path, *, drop: bool) -> float:
    """The least seconds of `repeat` runs, before each of which the file is read, or dropped from the page cache."""
    best = float("inf")
    for _ in range(repeat):
        gc.collect()
        if drop:
            drop_from_cache(path)
        else:
            read_file(path)
        started = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - started)
        del result
    return best


def read_file(path: Path) -> int:
    """Read a file from end to end into one piece of memory; its size."""
    return len(path.read_bytes())


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- servers

_PIECES = (
    "import argparse\nimport os\n\n\ndef main():\n    parser = argparse.ArgumentParser()\n",
    "\n\nclass TestReading(unittest.TestCase):\n    def test_empty(self):\n        self.assertEqual(",
    "\n\ndef read(self, size=-1):\n    if self.closed:\n        raise ValueError(",
)


def over_http(folder: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """The fourth table: the same text to both servers, greedily, streamed; the second of two rounds counts."""
    ours = [sys.executable, str(ROOT / "inference" / "server.py"), "--model", str(folder)]
    serve = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    theirs = [sys.executable, "-c", serve, "serve", str(folder), "--device", "cpu"]
    servers = [(f"inference/server.py, {dtype}", [*ours, "--dtype", dtype]) for dtype in ("bfloat16", "int8")]
    missing = [name for name in ("openai", "fastapi", "uvicorn", "pydantic") if not importlib.util.find_spec(name)]
    if "openai" in missing:
        print("the servers were not asked: the OpenAI client is not installed (pip install openai)")
        return
    if missing:
        print(f"transformers serve was not asked: it needs {', '.join(missing)} (pip install 'transformers[serving]')")
    else:
        servers.insert(0, ("transformers serve, bfloat16", [*theirs, "--dtype", "bfloat16"]))
    row = table("server", "request", "first text", "tokens/s after it")
    for name, command in servers:
        with running(command, options.folder / "server.log", threads=options.threads) as address:
            ask(address, str(folder), tokenizer, options)
            for turn, (first, rate) in enumerate(ask(address, str(folder), tokenizer, options), 1):
                row(name, turn, f"{1e3 * first:.0f} ms", f"{rate:.1f}")


def ask(address: str, model: str, tokenizer: Tokenizer, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Three pieces of one text, each behind the reply to the one before: seconds to the first text, tokens a second."""
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
    if model not in (names := [entry.id for entry in client.models.list()]) and names:
        model = names[0]
    prompt, figures = "", []
    for piece in _PIECES:
        prompt += piece
        times, texts = [], []
        started = time.perf_counter()
        asked = {"max_tokens": options.new_tokens, "temperature": 0, "stream": True}
        for chunk in client.completions.create(model=model, prompt=prompt, **asked):
            if chunk.choices and chunk.choices[0].text:
                times.append(time.perf_counter())
                texts.append(chunk.choices[0].text)
        first, *rest = (len(ids) for ids in tokenizer.encode(["".join(texts[:1]), "".join(texts)]))
        rate = (rest[0] - first) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
        figures.append((times[0] - started if times else float("nan"), rate))
        prompt += "".join(texts)
    return figures


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, *, threads: int | None) -> Iterator[str]:
    """A server's address, once it answers; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output, env=environment
        )
    try:
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/models", timeout=10):
                break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}: see {log}")
            time.sleep(0.2)
        else:
            raise SystemExit(f"the server did not answer within two minutes: see {log}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    main()
