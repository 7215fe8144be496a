"""Changes between releases of transformers: argument names, cache layers, attention hooks, internal tables."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

# `past_key_values` before 5.24, which renamed it.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str | None:
    """Return the name under which the model's forward takes keys and values of earlier tokens; None without them.

    Recurrent models take a `cache` too, of states that no text can be cut from; they count as models without one.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHE_ARGUMENTS if name in parameters), None)
    return name if name is not None and _has_key_values(model) else None


def _has_key_values(model: nn.Module) -> bool:
    """Whether any layer of the model's own cache keeps keys and values, or the model may keep them elsewhere."""
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=cast(PreTrainedConfig, model.config)).layers
    if layers:
        return any(isinstance(layer, DynamicLayer) for layer in layers)
    return not getattr(model, "_is_stateful", False)


def plain_cache_layers(config: PreTrainedConfig) -> int | None:
    """Return the number of layers if all of them keep every token's keys and values, one pair a layer; else None.

    Sliding windows, recurrent states and shared layers forget, or hold more than keys and values.
    """
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return len(layers) if plain else None


def has_recurrent_states(config: PreTrainedConfig) -> bool:
    """Whether any layer keeps a state besides keys and values, as those of Mamba do.

    Such layers continue from their state one token at a time; they read several tokens at once as the start of a text.
    """
    return any(hasattr(layer, "update_recurrent_state") for layer in DynamicCache(config=config).layers)


def compiles_as_a_whole(model: PreTrainedModel) -> bool:
    """Whether the model declares that torch.compile compiles its forward without a graph break."""
    quantizer = getattr(model, "hf_quantizer", None)
    return bool(getattr(model, "_can_compile_fullgraph", False)) and (
        quantizer is None or bool(getattr(quantizer, "is_compileable", False))
    )


def devices(model: PreTrainedModel) -> frozenset[object]:
    """Return the devices over which accelerate distributes the model; empty without accelerate."""
    return frozenset(getattr(model, "hf_device_map", {}).values())


def attend_by(model: PreTrainedModel, name: str) -> bool:
    """Set the model's attention to the function registered under `name`; return whether the model accepts it."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except ValueError:  # the family does not support it
        model.config._attn_implementation = before
    return model.config._attn_implementation == name


def gptj_attentions(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return GPT-J's attention modules where each computes in a method `_attn` and divides by its `scale_attn`.

    That is before 5.24, whose GPT-J uses the attention interface; since then there are none.
    """
    body: Any = model.transformer
    modules = [block.attn for block in body.h]
    return modules if all(hasattr(m, "scale_attn") and hasattr(m, "_attn") for m in modules) else []


def causal_lm_class(model_type: str) -> str:
    """Return the name of transformers' class of causal models of this type."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
    except ImportError:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))).__name__
    return names[model_type]


def has_causal_lm(model_type: str) -> bool:
    """Return whether transformers has a network of this type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def from_tensors(
    config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the causal model of a configuration with these tensors, mapped ones as they are, and its loading info.

    AutoModelForCausalLM takes none without a folder of weights.
    """
    import transformers

    kind: Any = getattr(transformers, causal_lm_class(config.model_type))
    loaded = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **options
    )
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


def silence() -> None:
    """Keep transformers' notes and progress bars off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
