"""The flags of a moderation model beside a chat, for every command that talks to a model."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from openchatkit.inference.moderation.model_moderator import ModelModerator
    from openchatkit.inference.moderation.policy import Policy


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add --moderation-model and the flags that go with it."""
    flags.add_argument(
        "--moderation-model",
        metavar="NAME",
        help="folder or hub name of a model that judges questions and answers, such as "
        "togethercomputer/GPT-JT-Moderation-6B; without it nothing is judged",
    )
    flags.add_argument(
        "--moderation-policy",
        type=Path,
        metavar="FILE",
        help="JSON or YAML: the action that each label leads to, and from which probability on",
    )
    flags.add_argument(
        "--moderation-gpu-id", type=cli.natural, metavar="ID", help="the GPU that judges; not given: that of --gpu-id"
    )
    flags.add_argument(
        "--moderation-dtype",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
        default="auto",
        help="its precision, as --dtype",
    )


def read_policy(given: argparse.Namespace) -> "Policy":
    """Read the policy that the flags name, or return the default."""
    from openchatkit.inference.moderation import policy

    return policy.Policy() if given.moderation_policy is None else policy.load(given.moderation_policy)


def load_moderator(given: argparse.Namespace, announce: Callable[[str], None]) -> "ModelModerator | None":
    """Load the moderation model that the flags name, and try it; None when they name none.

    UserError when the policy, the folder or the model is unusable: a chat never runs unmoderated by mistake.
    """
    if given.moderation_model is None:
        for flag in ("moderation_policy", "moderation_gpu_id"):
            if getattr(given, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} needs --moderation-model, which is not given")
        return None
    rules = read_policy(given)
    from openchatkit.inference.engine.engine import Engine
    from openchatkit.inference.loading import loader
    from openchatkit.inference.moderation.model_moderator import ModelModerator
    from openchatkit.inference.moderation.scorer import LabelScorer

    loader.silence_libraries()
    gpu_id = given.moderation_gpu_id if given.moderation_gpu_id is not None else getattr(given, "gpu_id", 0)
    try:
        loaded = loader.load(given.moderation_model, gpu_id=gpu_id, dtype=given.moderation_dtype, announce=announce)
        # Uncompiled: judging reads, and only the step that generates is compiled.
        engine = Engine(
            loaded.model,
            eos_ids=loaded.eos_ids,
            device=loaded.device,
            cache_dtype=loaded.cache_dtype,
            compile=False,
        )
        scorer = LabelScorer(engine, loaded.tokenizer)
    except UserError as error:
        raise UserError(f"the moderation model: {error}") from error
    moderator = ModelModerator(scorer, rules, name=given.moderation_model)
    moderator.try_out()
    return moderator
