"""The flags that name a model and settings: what they become, and what is refused."""

import pytest
import torch

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference import flags
from openchatkit.inference.engine.sampling import Sampling


def parse(*given: str):
    parser = cli.Parser(prog="command")
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    return parser.parse_args(given)


def test_the_settings_of_a_reply():
    assert flags.sampling(parse()) == Sampling()
    given = "--max-tokens 5 --no-sample --temperature 0.5 --top-k 0 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1"
    assert flags.sampling(parse(*given.split())) == Sampling(5, False, 0.5, 0, 0.9, 0.1, 1.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--top-k -1", "argument --top-k: expected a whole number of at least 0, got '-1'"),
        ("--top-p nan", "argument --top-p: expected a number of at least 0, got 'nan'"),
        ("--min-p -0.1", "argument --min-p: expected a number of at least 0, got '-0.1'"),
        ("--threads 0", "argument --threads: expected a whole number of at least 1, got '0'"),
        ("--dtype int4", "argument --dtype: invalid choice: 'int4'"),
        ("--load-8bit --load-4bit", "--load-4bit: not allowed with argument --load-8bit"),
        ("--template none", "argument --template: invalid choice: 'none'"),
        ("--seed 9223372036854775808", r"argument --seed: expected a whole number below 2\*\*63"),
        ("--threads 100000", "argument --threads: expected at most 1024 threads, got '100000'"),
        ("--threads 99999999999999999999", "argument --threads: expected at most 1024 threads"),
        ("-r 1e300", "argument -r/--cpu-ram: expected GiB above 0 and at most 1048576, got '1e300'"),
        ("-r 0", "argument -r/--cpu-ram: expected GiB above 0 and at most"),
        ("-g 0:1e300", "argument -g/--gpu-vram: expected GiB above 0 and at most"),
        ("-g 0", "argument -g/--gpu-vram: expected ID:GiB such as 0:10, got '0'"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_the_parser(given, message):
    with pytest.raises(UserError, match=message):
        parse(*given.split())


@pytest.mark.parametrize("given", ["--top-p 1.5", "--min-p 2", "--repetition-penalty 0"])
def test_settings_out_of_range_are_refused_before_a_model_is_looked_for(given):
    name = given.split()[0].removeprefix("--").replace("-", ".")
    with pytest.raises(UserError, match=name):
        flags.responder(parse("--model", "nowhere", *given.split()), lambda text: None)


def test_a_gpu_that_is_named_twice():
    with pytest.raises(UserError, match="-g names a GPU more than once: expected one ID:GiB for each"):
        flags.responder(parse("--model", "nowhere", "-g", "0:1", "1:1", "0:2"), lambda text: None)


def test_a_model_is_made_ready_to_answer(random_models, monkeypatch):
    threads, said = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    name = str(random_models["neox"])
    given = parse("--model", name, "--dtype", "int8", "--threads", "3", "--max-tokens", "4", "--template", "kit")
    responder = flags.responder(given, said.append, slots=2)
    assert threads[0] == 3  # measuring the processor may change it for a moment, and restores it
    assert len(said) == 1
    assert responder.rendering.name == "kit"
    assert responder.moderator is None
    reply = responder.answer("The", flags.sampling(given))
    assert len(reply.tokens) == 4


def test_flags_of_a_moderation_model_without_one(random_models):
    given = parse("--model", str(random_models["neox"]), "--moderation-gpu-id", "0")
    with pytest.raises(UserError, match="--moderation-gpu-id needs --moderation-model"):
        flags.responder(given, lambda text: None)
