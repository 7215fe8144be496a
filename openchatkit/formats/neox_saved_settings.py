"""The settings beside a checkpoint of GPT-NeoX: yml or json files, as they were written when it was trained.

They say what no tensor does: heads, residual, activation, rotation, tokenizer. What matters of them is read, whatever
else they hold, since settings of any age may lie there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats import neox_tokenizers
from openchatkit.formats.neox_layout import CONFIGS
from openchatkit.texts import reason_of

# GPT-NeoX's defaults of what describes a network or names its tokenizer; None for all others.
DEFAULTS: dict[str, Any] = {
    "norm": "layernorm",
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "scalenorm_epsilon": 1e-8,
    "use_qk_layernorm": False,
    "pos_emb": "learned",
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "rpe_num_buckets": 32,
    "rpe_max_distance": 128,
    "rpe_rule": "today",
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "no_weight_tying": False,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "mlp_multiple_of": 1,
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "sparsity": "none",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method": "normal",
    "output_layer_init_method": "scaled_normal",
    "init_method_std": 0.02,
    "seed": 1234,
    "tokenizer_type": "GPT2BPETokenizer",
}
# GPT-NeoX-20B as its own yml describes it: its weights are often fetched without that file.
_PUBLISHED: dict[str, Any] = {
    "num_layers": 44,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "bias_gelu_fusion": True,
    "max_position_embeddings": 2048,
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "20B_tokenizer.json",
}
# Networks that have the same tensors and compute something else.
_OTHER_NETWORKS = ("use_mup", "apply_residual_connection_post_layernorm", "soft_prompt_tuning")


class SavedSettings:
    """The settings of a checkpoint's folder, with the interface of `neox_settings.NeoxSettings`.

    `source` names the file, or the folder of several. UserError: files that contradict each other or hold no settings,
    none at all beside another model than GPT-NeoX-20B, whose blocks are counted by `blocks`.
    """

    def __init__(self, folder: Path, *, blocks: int) -> None:
        self._folder = folder
        self._given: dict[str, Any] = {}
        files = _find_files(folder)
        for file in files:
            for name, value in _read(file).items():
                if self._given.setdefault(name, value) != value:
                    raise UserError(
                        f"{file} says {name}: {value}, another file beside it {self._given[name]}; keep this model's"
                    )
        self.source = str(files[0] if len(files) == 1 else files[0].parent) if files else "GPT-NeoX-20B's settings"
        if not files:
            if blocks != _PUBLISHED["num_layers"]:
                raise UserError(
                    f"{folder.parent / CONFIGS}/*.yml is missing, and {folder} is not GPT-NeoX-20B; copy the yml files "
                    "that the model was trained with there: they say the number of heads and the kind of residual"
                )
            self._given = dict(_PUBLISHED)
        for name in _OTHER_NETWORKS:
            if self._given.get(name):
                raise UserError(f"{self.where(name)}: the kit has no such network")

    def get(self, name: str) -> Any:
        """Return a setting's value, or GPT-NeoX's default where it is not given or null."""
        default, value = DEFAULTS.get(name), self._given.get(name)
        if value is None:
            return default
        if name == "norm" and value == "apexlayernorm":  # 2021's name
            return "layernorm"
        if isinstance(value, str) and isinstance(default, (int, float)) and not isinstance(default, bool):
            try:
                return float(value)  # YAML reads 1e-5 as a text
            except ValueError:
                raise UserError(f"{self.where(name)}: expected a number") from None
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{self.where(name)}: expected true or false")
        return value

    def where(self, name: str) -> str:
        """Return where a setting was given, with its value."""
        if self._given.get(name) is None:
            return f"{self.source}: {name} is not given, by default {DEFAULTS.get(name)}"
        return f"{self.source}: {name} {self._given[name]}"

    def need(self, *names: str) -> list[int]:
        """Return whole numbers; UserError for one that is missing or below 1."""
        found = [self.get(name) for name in names]
        for name, value in zip(names, found, strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{self.source} does not say {name}, a whole number of at least 1")
        return found

    def load_tokenizer(self) -> neox_tokenizers.NeoxTokenizer | None:
        """Load the tokenizer that the settings name; None where its files are not here, nor beside the checkpoint."""
        kind = str(self.get("tokenizer_type"))
        if kind not in neox_tokenizers.KINDS:
            return None
        named = ["vocab_file", "merge_file"] if kind == "GPT2BPETokenizer" else ["vocab_file"]
        files = [] if kind == "CharLevelTokenizer" else [self._find(str(self.get(name))) for name in named]
        found = [file for file in files if file is not None]
        return neox_tokenizers.load(kind, *[*found, None, None][:2]) if len(found) == len(files) else None

    def _find(self, name: str) -> Path | None:
        """Return the file that a setting names, where it says, or by its last name beside the checkpoint."""
        beside = [self._folder, self._folder.parent, *_config_folders(self._folder)]
        places = [Path(name), *(place / name for place in beside), *(place / Path(name).name for place in beside)]
        return next((place for place in places if place.is_file()), None)


def _config_folders(folder: Path) -> list[Path]:
    return [folder / CONFIGS, folder.parent / CONFIGS]


def _find_files(folder: Path) -> list[Path]:
    """Return the files of settings in the first place that has some."""
    for place in (*_config_folders(folder), folder, folder.parent):
        files = [file for file in sorted(place.glob("*")) if file.suffix in (".yml", ".yaml", ".json")]
        if place.name != CONFIGS:
            # Beside the weights lie other json files: tokenizers, and this kit's own.
            files = [file for file in files if file.suffix != ".json" or _is_of_model(file)]
        if files:
            return files
    return []


def _is_of_model(path: Path) -> bool:
    try:
        return "num_layers" in _read(path)
    except UserError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Return a file's settings, hyphens as underscores."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no settings; fetch it again")
    return dict(_rename(loaded))


def _rename(loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in loaded.items():
        if value is not None:
            yield str(name).lstrip("-").replace("-", "_"), value
