"""The model families the kit knows, by the `model_type` of their config.json."""

from typing import Any

from openchatkit.errors import UserError
from openchatkit.models import gpt_neox, gptj, neox
from openchatkit.models.config import ModelConfig
from openchatkit.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (gpt_neox.FAMILY, gptj.FAMILY, neox.FAMILY)}


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json; UserError when its family is unknown or its settings are not supported."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type is {kind!r}; the kit knows {', '.join(FAMILIES)}")
    return FAMILIES[kind].config_from_hf(raw)


def family(config: ModelConfig) -> Family:
    """Return the family that a config belongs to."""
    return FAMILIES[config.family]
