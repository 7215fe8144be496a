"""A small GPT-NeoX as the library describes it and as Hugging Face does, for tests to change what they are about."""

from openchatkit.models.config import ModelConfig

NEOX = ModelConfig(
    family="gpt_neox",
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    rotary_dim=4,
    rotary_base=10000.0,
    activation="gelu",
    norm_eps=1e-5,
    parallel_residual=True,
    attention_bias=True,
    tie_embeddings=False,
    init_std=0.02,
)
_RAW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "neox": {"model_type": "gpt_neox", **_RAW},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "rotary_dim": 4, **_RAW},
}
# Of GPT-NeoX's options those that change what attention and MLPs are given.
OPTIONS = {
    "model_type": "neox",
    **_RAW,
    "norm": "rmsnorm",
    "hidden_act": "swiglu",
    "num_kv_heads": 2,
    "tie_word_embeddings": False,
}
