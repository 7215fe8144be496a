"""Decoding speed of the engine on random weights: growing cache, compiled static cache, and compiled with int8 weights.

The limit is the measured copy rate over the bytes of all weights but the embedding, each of which a token reads once.
"""

import contextlib
import gc
import time
from collections.abc import Iterator

import torch
from loguru import logger
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from _gpu_check import fixtures, timing
from _gpu_check.rows import Context, Result
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.engine.linear import Int8Linear, replace
from openchatkit.inference.engine.sampling import Sampling

GROWING, COMPILED, INT8 = "growing cache", "compiled", "compiled, int8"


def run(context: Context) -> None:
    """Decode with each model in each way: uncompiled first, int8 last."""
    device = torch.device(context.device)
    _, rate = timing.rates(context, device)
    shapes = context.pick({"2 x 64": (2, 64, 4)}, {name: fixtures.SHAPES[name][:3] for name in ("6.9b", "1.4b")})
    texts: dict[str, list[int]] = {}
    for way in (GROWING, COMPILED, INT8):
        for name, (layers, width, heads) in shapes.items():
            config = GPTNeoXConfig(
                vocab_size=context.pick(512, fixtures.VOCABULARY),
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=context.pick(128, 2048),
                bos_token_id=0,
                eos_token_id=0,
            )
            context.check(
                f"{name}, {way}",
                lambda r, n=name, c=config, w=way: decode(r, context, c, w, rate, texts, n),
                needs_seconds=context.pick(1, 5 if way == GROWING else 25),
            )
            gc.collect()
            torch.compiler.reset()
            if context.cuda:
                torch.cuda.empty_cache()


def decode(
    result: Result, context: Context, config: GPTNeoXConfig, way: str, rate: float, texts: dict, name: str
) -> None:
    """Two replies to one prompt, of which the second counts: by then all is compiled."""
    device = torch.device(context.device)
    dtype = torch.bfloat16 if context.cuda else torch.float32
    model = make_model(config, device, dtype)
    if way == INT8:
        replace(model, lambda _, linear: Int8Linear(linear, device=device, dtype=dtype), "int8")
    options = None if context.cuda else {"backend": "aot_eager"}
    engine = Engine(model, eos_ids=(), device=device, compile=way != GROWING, compile_options=options)
    prompt_tokens, new_tokens = context.pick((32, 16), (256, 128))
    prompt = torch.randint(0, config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with warnings_logged() as warnings:
        started = time.perf_counter()
        reply(engine, prompt, new_tokens)
        first = time.perf_counter() - started
        tokens, times = reply(engine, prompt, new_tokens)
    speed = (len(times) - 1) / (times[-1] - times[0])
    limit = rate / weight_bytes(model)
    result.values["tokens/s"], result.values["limit"] = speed, limit
    result.values["of the limit"] = speed / limit
    result.values["s of the first reply"] = first
    result.require(not warnings, "; ".join(warnings))
    result.require(len(tokens) == new_tokens, f"{len(tokens)} tokens came of {new_tokens}")
    if way == GROWING:
        texts[name] = tokens
    elif name in texts:
        pairs = zip(tokens, texts[name], strict=True)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(tokens))
        result.values["first tokens as uncompiled"] = same
        # In float32 nothing but the order of additions differs; bfloat16 and int8 may part where two are near.
        if dtype == torch.float32 and way == COMPILED:
            result.require(same == len(tokens), f"compiled, the text differs from token {same} on")


def make_model(config: GPTNeoXConfig, device: torch.device, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    """A model of random weights, made on the device in its precision: the host never holds it."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = GPTNeoXForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def reply(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and when each came."""
    tokens, times = [], []
    for token in engine.generate(prompt, Sampling(max_tokens=new_tokens, sample=False)):
        times.append(time.perf_counter())
        tokens.append(token)
    return tokens, times


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights but the embedding's, int8 ones as they are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if "embed_in" not in name)


@contextlib.contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """Collect the kit's warnings. A failure to compile is only logged, and the model then runs uncompiled."""
    warnings: list[str] = []
    sink = logger.add(lambda text: warnings.append(str(text).strip()), level="WARNING", format="{message}")
    try:
        yield warnings
    finally:
        logger.remove(sink)
