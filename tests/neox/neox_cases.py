"""GPT-NeoX's shipped configurations as key and value, how its files write such, and a task to evaluate."""

import json
from pathlib import Path
from typing import Any

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
SHIPPED: dict[str, dict[str, Any]] = GOLDEN["configs"]

# Shipped configurations of what the kit does not have, with the setting that their refusal names.
REFUSED = {
    "configs2021/gmlp_small.yml": "attention_config",
    "configs/1-3B-transformer-engine.yml": "te_layernorm_mlp",
    "configs/125M-dmoe.yml": "moe_num_experts",
    # Of another fork: GPT-NeoX itself does not know this one either.
    "configs/llemma/34B.yml": "attention_type",
    "configs/mamba/mamba-130M.yml": "attention_config",
    "configs/mamba/mamba-2.8B.yml": "attention_config",
    "configs/mamba/mamba-370M.yml": "attention_config",
    "configs/mistral/7B.yml": "tokenizer_type",
    "configs/rwkv/170M.yml": "attention_config",
}

# A model and a step, in as few settings as make a run.
SMALLEST: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 3,
    "tokenizer_type": "CharLevelTokenizer",
    "eval_iters": 0,
}


def in_yaml(settings: dict[str, Any]) -> str:
    """Settings as GPT-NeoX's files have them: a block in braces, hyphens, comments, trailing commas, True."""
    lines = [f'  "{name.replace("_", "-")}": {in_yaml_value(value)},  # a comment' for name, value in settings.items()]
    return "\n".join(["{", *lines, "}", ""])


def in_yaml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + "".join(f'"{name}": {in_yaml_value(inner)}, ' for name, inner in value.items()) + "}"
    return {"true": "True", "false": "False"}.get(json.dumps(value), json.dumps(value))


# An evaluation task of local records.
TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
QUESTIONS = [
    {"question": f"What does it say? {word}", "choices": ["The answer", "one goes on and on"], "gold": number % 2}
    for number, word in enumerate(["this", "that", "one", "on", "and", "answer"])
]


def write_task(folder: Path) -> Path:
    """Write a task, own_choice, and its records into a folder; return the folder."""
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "choice.yaml").write_text(TASK.format(folder=folder))
    return folder
