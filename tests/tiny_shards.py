"""Small prepared folders and checkpoints with random weights, made without transformers."""

import json

import torch

from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import CONFIG
from openchatkit.formats.shard_writer import ShardWriter
from openchatkit.formats.tensor_file import TensorSpec, tensor_bytes
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "rotary_pct": 0.5,
}
GPTJ = {"model_type": "gptj", "vocab_size": 24, "n_embd": 8, "n_layer": 3, "n_head": 2, "rotary_dim": 2}


def weights(raw, *, seed=0):
    """Random weights of every shard: {shard: {name: tensor}}."""
    config = config_from_hf(raw)
    generator = torch.Generator().manual_seed(seed)
    return {
        shard: {
            name: torch.randn(shape, generator=generator)
            for name, shape in family(config).parameter_shapes(config, shard).items()
        }
        for shard in shard_names(config.num_layers)
    }


def write_prepared(folder, raw=NEOX, *, seed=0, made=None):
    """A prepared folder, of weights that were `made` or of random ones; returns them."""
    source = folder.with_name(f"{folder.name}_source")
    for path in (folder, source):
        path.mkdir(parents=True, exist_ok=True)
    (source / CONFIG).write_text(json.dumps(raw))
    writer = ShardWriter(folder, config_from_hf(raw), source=source, about={"seed": seed})
    made = made or weights(raw, seed=seed)
    for shard, tensors in made.items():
        if shard not in writer.done:
            specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            writer.write(shard, specs, lambda name, tensors=tensors: [tensor_bytes(tensors[name])])
    writer.finish()
    return made


def optimizer_state(tensors):
    """State as AdamW and 8-bit Adam keep it: tensors, also of no dimension, and plain numbers."""
    return {
        name: {"step": torch.tensor(3.0), "exp_avg": tensor * 0.1, "state1": tensor.to(torch.uint8), "beta": 0.1 + seed}
        for seed, (name, tensor) in enumerate(tensors.items())
    }


def write_checkpoint(root, step, raw=NEOX, *, tokenizer=None, optimizer=True):
    """A checkpoint whose weights are those of the seed `step`; returns them."""
    made = weights(raw, seed=step)
    temporary = checkpoint.begin(root, step)
    records = [checkpoint.write_weights(temporary, shard, tensors) for shard, tensors in made.items()]
    if optimizer:
        records += [checkpoint.write_optimizer(temporary, s, optimizer_state(t)) for s, t in made.items()]
    state = {"step": step, "lr": 0.1 + 0.2, "layout": {"stages": 2, "layers_per_stage": 2, "replicas": 1}}
    path = checkpoint.finish(
        temporary, root, step, state=state, records=records, raw_config=raw, tokenizer_from=tokenizer
    )
    assert path == root / f"checkpoint_{step}"
    return made


def flip(path, position=-1, bit=0):
    """Alter one bit of a file, leaving its size as it is."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def equal(a, b):
    """Whether two dicts hold the same tensors, to the bit and the dtype."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
