"""Small Hugging Face models of random weights, as transformers writes them, and training checkpoints made of them."""

import shutil

import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES

NEOX = {
    "vocab_size": 400,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GPTJ = {"vocab_size": 400, "n_embd": 16, "n_layer": 5, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
VARIANTS = {
    "neox": NEOX,
    "neox_tied": {**NEOX, "tie_word_embeddings": True},
    "neox_sequential": {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 5000},
    "neox_no_bias": {**NEOX, "attention_bias": False, "hidden_act": "gelu_fast"},
    "gptj": GPTJ,
    "gptj_tied": {**GPTJ, "tie_word_embeddings": True},
}


def build(variant):
    """A transformers model in evaluation mode whose biases and norms are random too."""
    torch.manual_seed(0)
    options = {"bos_token_id": 0, "eos_token_id": 2, **VARIANTS[variant]}
    gptj = variant.startswith("gptj")
    model = GPTJForCausalLM(GPTJConfig(**options)) if gptj else GPTNeoXForCausalLM(GPTNeoXConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(folder, variant, *, tokenizer=None, form="safetensors", dtype=None):
    """A model's folder in one of the forms that hubs offer; returns the model."""
    model = build(variant)
    if dtype:
        model = model.to(dtype)
    folder.mkdir(parents=True)
    if form == "bin":
        model.config.save_pretrained(folder)
        kept = dict(model.state_dict())
        if "neox" in variant:
            kept = {key.replace("lm_head.", "embed_out."): tensor for key, tensor in kept.items()}
            kept["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
            kept["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
        else:
            kept["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
            kept["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
        torch.save(kept, folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "1GB")
    if tokenizer:
        copy_tokenizer(tokenizer, folder)
    return model


def copy_tokenizer(source, target):
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def checkpoint_of(shards_folder, root, step=3, *, stages=3, layers_per_stage=2, tokenizer=True):
    """A checkpoint with the weights of a prepared folder, as training would write it at step 0 of its work."""
    shards = LayerShards.open(shards_folder)
    temporary = checkpoint.begin(root, step)
    records = [checkpoint.write_weights(temporary, shard, shards.read(shard)) for shard in shards.shards]
    layout = {"stages": stages, "layers_per_stage": layers_per_stage, "replicas": 1}
    return checkpoint.finish(
        temporary,
        root,
        step,
        state={"step": step, "layout": layout},
        records=records,
        raw_config=shards.raw_config,
        tokenizer_from=shards_folder if tokenizer else None,
    )


def run(main, *arguments):
    """Run a command in this process; returns its exit status."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0
