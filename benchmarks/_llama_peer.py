"""llama.cpp as a peer of the benchmark of chatting, by its Python package; None of it is needed to run the others.

`pip install llama-cpp-python gguf`. The model is written as GGUF from the Hugging Face folder, without a tokenizer:
both sides are given token ids. Queries, keys and values lie one behind the other there, by head here.
"""

import ctypes
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# Bytes a weight: Q8_0 has a scale of 2 bytes for every 32.
PRECISIONS = {"float32": ("F32", 4.0), "bfloat16": ("BF16", 2.0), "Q8_0": ("Q8_0", 34 / 32)}
CACHED_BYTES = 2  # keys and values are kept in float16
CONTEXT = 2048


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]


def decoder(folder: Path, precision: str, new_tokens: int) -> Callable[[Sequence[int]], tuple[list[float], list[int]]]:
    """Read a prompt and choose tokens greedily: when it began and each token came, and the tokens."""
    import llama_cpp
    import numpy

    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(_written(folder, PRECISIONS[precision][0])),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    words = llama.n_vocab()

    def decode(prompt: Sequence[int]) -> tuple[list[float], list[int]]:
        llama.reset()
        times, tokens, unread = [time.perf_counter()], [], list(prompt)
        for _ in range(new_tokens):
            llama.eval(unread)
            pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            logits = numpy.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (words,))
            tokens.append(int(logits.argmax()))
            times.append(time.perf_counter())
            unread = tokens[-1:]
        return times, tokens

    return decode


def _written(folder: Path, kind: str) -> Path:
    """The model's GGUF file, made where it is not there."""
    import gguf

    path = folder / f"model-{kind}.gguf"
    if path.is_file():
        return path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(str(path) + ".tmp", "gptneox")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head * config.rope_parameters["partial_rotary_factor"]))
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(model):
        array = tensor.detach().float().contiguous().numpy()
        quantised = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(str(path) + ".tmp").rename(path)
    return path


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def _tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    body, heads = model.gpt_neox, model.config.num_attention_heads
    found = [("token_embd.weight", body.embed_in.weight), ("output.weight", model.get_output_embeddings().weight)]
    found += [(f"output_norm.{part}", getattr(body.final_layer_norm, part)) for part in ("weight", "bias")]
    for number, layer in enumerate(body.layers):
        for name, theirs in _NAMES.items():
            for part in ("weight", "bias"):
                tensor = getattr(layer.get_submodule(name), part)
                if theirs == "attn_qkv":
                    tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                found.append((f"blk.{number}.{theirs}.{part}", tensor))
    return found
