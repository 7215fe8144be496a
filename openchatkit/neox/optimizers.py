"""GPT-NeoX's optimizers, their parameters, and its loss scalers, as the trainer's settings."""

from typing import Any

from openchatkit.errors import UserError
from openchatkit.neox.config import NeoxConfig

# The trainer's names, by GPT-NeoX's in small letters. That it would take torch's Adam for cpu_torch_adam is written
# there and never happens: it compares the whole block with the name.
_NAMES = {
    "adam": "adamw",
    "cpu_adam": "adamw",
    "cpu_torch_adam": "adamw",
    "sm3": "sm3",
    "madgrad_wd": "madgrad",
    "lion": "lion",
}
_OTHERS = {
    "onebitadam": "it is for slow links between machines, and not here yet: use Adam",
    "sgd": "it belongs to µP, which is not here: use Adam",
}

# What each takes, besides lr, with the values where none is given.
_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "adam": _ADAM | {"adam_w_mode": True},
    "cpu_adam": _ADAM | {"adamw_mode": True},
    "cpu_torch_adam": _ADAM | {"adamw_mode": True},
    "sm3": {"momentum": 0.0, "beta": 0.0, "eps": 1e-30},
    "madgrad_wd": {"momentum": 0.9, "eps": 1e-6},
    "lion": {"betas": [0.9, 0.99]},
}

# Steps in a row without a finite gradient after which GPT-NeoX ends a run.
_MAX_OVERFLOWS = 50


def translate_optimizer(config: NeoxConfig, *, replicas: int, notes: list[str]) -> dict[str, Any]:
    """Return the optimizer and its constants; UserError for one that there is not, or whose parameters are wrong."""
    given = config.get("optimizer") or {}
    if not given.get("type") or "params" not in given:
        raise UserError('optimizer is missing: expected {"type": "Adam", "params": {"lr": 0.0006}} for example')
    where, written, kind = config.given["optimizer"].where, given["type"], given["type"].lower()
    if kind not in _NAMES:
        why = _OTHERS.get(kind, "GPT-NeoX has no such optimizer: use Adam")
        raise UserError(f"{where}: optimizer.type {written}: {why}")
    params = _read_parameters(config, kind)
    flags = {
        "optimizer": _NAMES[kind],
        "lr": params["lr"],
        "adam_eps": params.get("eps"),
        "momentum": params.get("momentum"),
        "sm3_beta": params.get("beta"),
        "weight_decay": config.get("weight_decay"),
        "max_grad_norm": config.get("gradient_clipping"),
    }
    if "betas" in params:
        if len(params["betas"]) != 2:
            raise UserError(f"{where}: optimizer.params.betas {params['betas']}: expected two")
        flags |= {"adam_beta1": params["betas"][0], "adam_beta2": params["betas"][1]}
    if kind.startswith("cpu_"):
        flags["use_offload"] = True
    if not params.get("adam_w_mode", True) or not params.get("adamw_mode", True):
        flags["optimizer"] = "adam"
    if kind == "sm3":
        flags |= _translate_whole_matrices(config, replicas, notes)
    if config.get("use_bnb_optimizer"):
        if kind == "adam":
            flags["optimizer"] = "8bit-adam"
            notes.append(f"{config.where('use_bnb_optimizer')}: 8-bit Adam; the embedding has no norm, as it has there")
        else:
            notes.append(f"{config.where('use_bnb_optimizer')}: it has no effect with {written}")
    return flags


def translate_loss_scale(config: NeoxConfig) -> dict[str, Any]:
    """Return the loss scale of float16 by GPT-NeoX's rule: that of ZeRO, or the one without.

    Without ZeRO each overflow halves the scale, and the least scale ends nothing.
    """
    half, shared = config.block("fp16"), config.block("zero_optimization")["stage"] >= 1
    return {
        "loss_scale": half["loss_scale"],
        "initial_loss_scale": 2 ** half["initial_scale_power"],
        "min_loss_scale": half["min_loss_scale"],
        "loss_scale_window": half["loss_scale_window"],
        "hysteresis": half["hysteresis"] if shared else 1,
        "consecutive_hysteresis": half["consecutive_hysteresis"] and shared,
        "end_at_min_loss_scale": shared,
        "max_overflows": _MAX_OVERFLOWS,
    }


def translate_norms(config: NeoxConfig, notes: list[str]) -> dict[str, Any]:
    """Return what norms are recorded; GPT-NeoX has those of each parameter."""
    kinds = {"log_grad_norm": "gradients", "log_param_norm": "parameters", "log_optimizer_states": "optimizer-state"}
    asked = {name: kind for name, kind in kinds.items() if config.get(name)}
    if "log_optimizer_states" in asked and config.get("use_bnb_optimizer"):
        notes.append(f"{config.where('log_optimizer_states')}: state of 8 bits has no norms")
        del asked["log_optimizer_states"]
    if asked:
        notes.append(f"{', '.join(map(config.where, asked))}: norms are of layers, not of single parameters")
    return {"log_norms": ",".join(asked.values()) or None}


def _read_parameters(config: NeoxConfig, kind: str) -> dict[str, Any]:
    """Return what an optimizer takes; UserError for what it has none of, which GPT-NeoX refuses as well."""
    params, known = config.block("optimizer.params"), _PARAMETERS[kind]
    written = config.get("optimizer")["type"]
    choices = {name for each in _PARAMETERS.values() for name in each}
    if others := [name for name in choices - known.keys() if params[name] is not None]:
        raise UserError(
            f"{config.given['optimizer'].where}: optimizer.params.{min(others)}: {written} has no such parameter, it "
            f"takes {', '.join(sorted(known.keys() | {'lr'}))}: leave it out"
        )
    return {"lr": params["lr"]} | {n: value if params[n] is None else params[n] for n, value in known.items()}


def _translate_whole_matrices(config: NeoxConfig, replicas: int, notes: list[str]) -> dict[str, Any]:
    """Return how SM3, which needs whole matrices, is spread: GPT-NeoX keeps maxima of the parts of each rank."""
    parts, stage = config.get("model_parallel_size"), config.block("zero_optimization")["stage"]
    if parts > 1:
        raise UserError(
            f"{config.where('model_parallel_size')}: SM3 keeps maxima of whole rows and columns, which tensor ranks "
            "would cut: use pipe_parallel_size, or another optimizer"
        )
    if stage and replicas > 1:
        notes.append(f"zero_optimization.stage {stage}: replicas all have the state of SM3, which needs whole matrices")
    return {"dp_mode": "allreduce"}
