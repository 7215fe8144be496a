"""`neox/generate.py`, also `text_gen_gpt2.py`: text from the checkpoint that a GPT-NeoX configuration names.

Owns GPT-NeoX's three modes, the form of their results and the meaning of its settings. The model is loaded and decoded
as a chat's is, in one process.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from openchatkit import cli, progress
from openchatkit.errors import UserError
from openchatkit.neox import arguments, hosts, key_tables, trained
from openchatkit.neox.config import NeoxConfig
from openchatkit.storage import check_writable, storage_errors, write_text
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    from openchatkit.inference.engine.sampling import Sampling

# Keys that are not of training alone: what it refuses may be of no concern here.
_KEYS = {*key_tables.GENERATION, *key_tables.REFUSED}
_PROMPT = "Context prompt >>> "


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Generate text as GPT-NeoX's configuration files say."""
    parser = arguments.ConfigurationParser(
        prog="neox/generate.py",
        usage="%(prog)s [-d DIR] CONF... [-i FILE] [-o FILE] [--iteration N] [--KEY VALUE ...]",
        description="Generate text with the model that GPT-NeoX's configuration files describe, from its checkpoint.",
    )
    parser.add_files()
    generate(arguments.parse(parser, argv).read_config())


def generate(config: NeoxConfig) -> None:
    """Generate text in the configuration's mode: samples without a prompt, after each prompt of a file, or in turns."""
    config.check(among=_KEYS)
    mode = config.get("text_gen_type") or ("input-file" if config.get("sample_input_file") else "unconditional")
    sampling = read_sampling(config)
    if mode == "interactive":
        end = _find_prompt_end(config)
        _interact(Generator(config, sampling), end, sys.stdin, sys.stdout)
        return
    prompts = [""] * _count_samples(config) if mode == "unconditional" else _read_prompts(config)
    output = _find_output(config, mode)
    _write(output, Generator(config, sampling), prompts)


class Generator:
    """The model of a configuration's checkpoint, in `folder`, ready to continue texts.

    Draws follow the configuration's seed, text after text.
    """

    def __init__(self, config: NeoxConfig, sampling: "Sampling") -> None:
        path = trained.find_trained(config)
        import torch

        from openchatkit.inference.engine.engine import Engine
        from openchatkit.inference.loading import loader

        loader.silence_libraries()
        dtype = config.precision if hosts.count_gpus() else "auto"
        with trained.open_tokenizer(config, path) as folder:
            loaded = loader.load(str(path), dtype=dtype, tokenizer=folder, announce=progress.announce)
        self.folder, self.tokenizer, self._sampling = loaded.folder, loaded.tokenizer, sampling
        self._engine = Engine(
            loaded.model,
            eos_ids=loaded.eos_ids | {loaded.tokenizer.end_of_text},
            device=loaded.device,
            cache_dtype=loaded.cache_dtype,
            recompute=config.get("recompute"),
        )
        self._draws = torch.Generator().manual_seed(config.get("seed"))

    def continue_text(self, context: str, *, take: Callable[[int], None] = lambda token: None) -> dict[str, Any]:
        """Return what follows a text, or no text at all, by GPT-NeoX's fields; `take` gets each token as it comes.

        `finished`: the model ended the text itself. `message` says what was out of the ordinary.
        """
        from openchatkit.inference.engine.engine import most_tokens

        started = time.perf_counter()
        prompt = self.encode(context)
        limit, tokens, message = self._engine.context_length, list[int](), None
        if limit is not None and len(prompt) > limit:
            most, message = 1, f"the prompt has {len(prompt)} tokens, the model reads {limit}: shorten it"
        else:
            most = most_tokens(len(prompt), self._sampling.max_tokens, limit)
            for token in self._engine.generate(prompt, self._sampling, self._draws):
                tokens.append(token)
                take(token)
            message = self._describe(tokens, most)
        return {
            "context": context,
            "text": self.tokenizer.decode(tokens) if tokens else None,
            "length": len(tokens),
            "finished": len(tokens) < most and (limit is None or len(prompt) <= limit),
            "message": message,
            "duration_seconds": time.perf_counter() - started,
        }

    def encode(self, context: str) -> list[int]:
        """Return the tokens that the model reads of a text: end-of-text where there is none."""
        return self.tokenizer.encode([context])[0] or [self.tokenizer.end_of_text]

    def _describe(self, tokens: Sequence[int], most: int) -> str | None:
        """Return what was out of the ordinary, or None."""
        if not tokens:
            return "no text came: the model's first token was end-of-text"
        notes = []
        if len(tokens) == most < self._sampling.max_tokens:
            notes.append(f"the text met the end of the model's {self._engine.context_length} positions")
        if strange := sum(token >= self.tokenizer.vocab_size for token in tokens):
            notes.append(f"{strange} of the tokens are not in the tokenizer, and are left out of the text")
        return "; ".join(notes) or None


def read_sampling(config: NeoxConfig) -> "Sampling":
    """Return how tokens are chosen, by GPT-NeoX's rule: the most probable one only if all three settings are 0.

    Else logits are divided by a temperature above 0; the `top_k` largest are kept, and those equal to the last of them;
    then the most probable until their sum is above `top_p`.
    """
    temperature, top_k, top_p = (config.get(name) for name in ("temperature", "top_k", "top_p"))
    for name, fits, expected in (
        ("temperature", temperature >= 0, "a number of at least 0"),
        ("top_k", top_k >= 0, "a whole number of at least 0; 0 keeps all tokens"),
        ("top_p", 0 <= top_p <= 1, "a number from 0 to 1; 0 keeps all tokens"),
        ("maximum_tokens", config.get("maximum_tokens") >= 1, "a whole number of at least 1"),
    ):
        if not fits:
            raise UserError(f"{config.where(name)}: expected {expected}")
    from openchatkit.inference.engine.sampling import Sampling

    return Sampling(
        max_tokens=config.get("maximum_tokens"),
        sample=bool(temperature or top_k or top_p),
        temperature=float(temperature or 1),
        top_k=top_k,
        # A chat's tokens reach the sum; here a sum that is equal is not above it.
        top_p=min(math.nextafter(top_p, 2), 1.0) if top_p else 1.0,
    )


def _count_samples(config: NeoxConfig) -> int:
    count = config.get("num_samples")
    if count < 0:
        raise UserError(f"{config.where('num_samples')}: expected a whole number of at least 1")
    return int(count or 1)  # 2021's default is 0


def _find_prompt_end(config: NeoxConfig) -> str:
    end: str = config.get("prompt_end")
    if not end:
        raise UserError(f"{config.where('prompt_end')}: it is empty: expected what ends a prompt, \\n for example")
    return end


def _read_prompts(config: NeoxConfig) -> list[str]:
    if config.get("sample_input_file") is None:
        raise UserError(f"{config.where('text_gen_type')}: sample_input_file is not given: name it, or pass -i FILE")
    path, end = Path(config.get("sample_input_file")), _find_prompt_end(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{config.where('sample_input_file')} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{config.where('sample_input_file')} is not UTF-8: {reason_of(error)}") from error
    prompts = [prompt for part in text.split(end) if (prompt := part.strip())]
    if not prompts:
        raise UserError(f"{config.where('sample_input_file')} holds no prompt: each ends with {end!r}")
    return prompts


def _find_output(config: NeoxConfig, mode: str) -> Path:
    """Return the file of the results; UserError where it cannot be written, before a model is loaded."""
    given, prompts = config.get("sample_output_file"), config.get("sample_input_file")
    path = Path(given or (f"{prompts}.output.jsonl" if mode == "input-file" else "samples.txt"))
    check_writable(path)
    return path


def _write(output: Path, generator: Generator, prompts: Sequence[str]) -> None:
    """Write a line for what follows each prompt; where something ends that, for those that are done."""
    lines: list[str] = []
    try:
        with progress.bar(len(prompts), "texts", unit="text") as bar:
            for prompt in prompts:
                lines.append(json.dumps(generator.continue_text(prompt), ensure_ascii=False) + "\n")
                bar.update()
    finally:
        if lines:
            from loguru import logger

            with storage_errors(output, every=True):
                write_text(output, "".join(lines))
            logger.info(f"{len(lines)} of {len(prompts)} texts, by {generator.folder}, are in {output}")


def _interact(generator: Generator, end: str, stdin: TextIO, stdout: TextIO) -> None:
    """Continue each prompt that is typed, until the end of input; Ctrl-C ends a text, and at a prompt the command."""
    from openchatkit.inference.streaming import ReplyStream

    for prompt in _type_prompts(end, stdin, stdout):
        stream = ReplyStream(generator.tokenizer.decode, before=generator.encode(prompt), trim=False)

        def show(token: int, stream: ReplyStream = stream) -> None:
            stdout.write(stream.push(token))
            stdout.flush()

        try:
            result = generator.continue_text(prompt, take=show)
        except KeyboardInterrupt:
            result = {"message": "interrupted"}
        stdout.write(stream.flush() + "\n")
        stdout.flush()
        if result["message"] is not None:
            print(result["message"], file=sys.stderr, flush=True)


def _type_prompts(end: str, stdin: TextIO, stdout: TextIO) -> Iterator[str]:
    """Yield the prompts of an input: lines up to one that holds `end`. What follows it there begins the next prompt."""
    text = ""
    while True:
        while end in text:
            prompt, text = text.split(end, 1)
            text = text.removeprefix("\n")  # the line break that sends a prompt is no part of the next one
            if prompt.strip():
                yield prompt
            elif stdin.isatty():
                print("the prompt is empty: type a text to go on from", file=sys.stderr, flush=True)
        if stdin.isatty():
            stdout.write("" if text else _PROMPT)
            stdout.flush()
        line = stdin.readline()
        if not line:
            if text.strip():
                yield text.removesuffix("\n")
            return
        text += line
