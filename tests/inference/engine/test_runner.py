"""The compiled step over a static cache, on the CPU with backends that trace as for a GPU: the same tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from openchatkit.inference.engine.engine import Engine, Statistics
from openchatkit.inference.engine.runner import CompiledRunner, can_compile
from openchatkit.inference.engine.sampling import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(max_tokens=20, sample=False)


@pytest.fixture(autouse=True)
def compile_from_scratch():
    """The forward pass of a family is one code object to the compiler, which counts its compilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def engines(folder, backend) -> tuple[Engine, Engine]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    compiled = Engine(model, eos_ids=(), device=CPU, compile=True, compile_options={"backend": backend})
    return compiled, Engine(model, eos_ids=(), device=CPU)


@pytest.mark.parametrize(("family", "backend"), [("neox", "aot_eager"), ("gptj", "eager")])
def test_turns_are_those_of_the_growing_cache(random_models, family, backend):
    compiled, plain = engines(random_models[family], backend)
    first = list(range(100, 130))
    said = list(plain.generate(first, GREEDY))
    second = [*first, *said, 7]
    prompts = [[5], first, second, first, [*second[:12], 9], second]
    for prompt, lookup in zip(prompts, (False, False, True, False, True, False), strict=True):
        counts = [Statistics(), Statistics()]
        replies = [
            list(running.generate(prompt, GREEDY, statistics=count, lookup=lookup))
            for running, count in zip((compiled, plain), counts, strict=True)
        ]
        assert replies[0] == replies[1]
        assert counts[0].cached_tokens == counts[1].cached_tokens
    assert compiled.log_likelihoods(first, [[3], [4, 5, 6]]) == pytest.approx(
        plain.log_likelihoods(first, [[3], [4, 5, 6]]), abs=1e-4
    )
    assert compiled.runner._compiled is not None, "it fell back"


def test_one_graph_serves_all_tokens_and_one_all_drafts(random_models):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled, plain = engines(random_models["neox"], backend)
    for _ in range(2):
        for prompt in ([5, 6, 7], [8] * 40):
            assert list(compiled.generate(prompt, GREEDY)) == list(plain.generate(prompt, GREEDY))
    assert len(graphs) == 1
    statistics = Statistics()
    list(compiled.generate([8, 9] * 20, GREEDY, statistics=statistics, lookup=True))
    assert statistics.drafted_tokens > 0
    assert len(graphs) == 2
    compiled.forget()


def no_compiler(graph, inputs):
    raise OSError("no compiler here")


def runs_and_fails(graph, inputs):
    def run(*args):
        graph.forward(*args)  # which has changed the cache by the time of the error
        raise OSError("no compiler here")

    return run


@pytest.mark.parametrize("broken", [no_compiler, runs_and_fails])
def test_where_compiling_fails_the_model_runs_uncompiled_with_a_warning(random_models, capsys, broken):
    compiled, plain = engines(random_models["neox"], broken)
    for prompt in ([5, 6, 7], [5, 6, 7, 8]):
        assert list(compiled.generate(prompt, GREEDY)) == list(plain.generate(prompt, GREEDY))
    noted = [line for line in capsys.readouterr().err.splitlines() if "cannot be compiled here" in line]
    assert len(noted) == 1
    assert "no compiler here" in noted[0]


def test_ctrl_c_while_it_compiles_leaves_the_cache_right(random_models, monkeypatch):
    def interrupted(graph, inputs):
        raise KeyboardInterrupt

    compiled, plain = engines(random_models["neox"], interrupted)
    stream = compiled.generate([5, 6, 7], GREEDY)
    token = next(stream)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    compiled.runner._compiled = None
    statistics = Statistics()
    prompt = [5, 6, 7, token, 9]
    assert list(compiled.generate(prompt, GREEDY, statistics=statistics)) == list(plain.generate(prompt, GREEDY))
    assert statistics.cached_tokens == 3


def test_only_models_that_can_compile_are_compiled_and_by_default_only_on_a_gpu(random_models, capsys):
    model = AutoModelForCausalLM.from_pretrained(random_models["neox"]).eval()
    assert can_compile(model, 512)
    assert not can_compile(model, None)
    assert not can_compile(model, 1 << 20)
    assert not isinstance(Engine(model, eos_ids=(), device=CPU).runner, CompiledRunner)
    model.hf_device_map = {"gpt_neox": 0, "lm_head": "disk"}
    assert not can_compile(model, 512)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(**tiny, num_hidden_layers=1, vocab_size=384, sliding_window=8)).eval()
    assert not can_compile(sliding, 512)
    running = Engine(sliding, eos_ids=(), device=CPU, compile=True)
    assert not isinstance(running.runner, CompiledRunner)
    assert "runs uncompiled" in capsys.readouterr().err
