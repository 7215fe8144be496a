"""The flags that put a moderation model beside a chat, for every command that talks to a model."""

import argparse
from collections.abc import Callable
from pathlib import Path

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference.moderation import policy


def add_flags(flags: argparse.ArgumentParser) -> None:
    """--moderation-model and what goes with it."""
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
        help="JSON or YAML: what the labels lead to, and from where on",
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


def policy_of(given: argparse.Namespace) -> policy.Policy:
    """The policy that the flags name, or the default."""
    return policy.Policy() if given.moderation_policy is None else policy.load(given.moderation_policy)


def moderator(given: argparse.Namespace, announce: Callable[[str], None]) -> "ModelModerator | None":  # noqa: F821
    """Load the moderation model that the flags name, and try it out; None when they name none.

    UserError when the policy, the folder or the model will not do: a chat that was to be moderated does not start.
    """
    if given.moderation_model is None:
        for flag in ("moderation_policy", "moderation_gpu_id"):
            if getattr(given, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} needs --moderation-model, which is not given")
        return None
    rules = policy_of(given)
    from openchatkit.inference.engine.engine import Engine
    from openchatkit.inference.loading import loader
    from openchatkit.inference.moderation.model_moderator import ModelModerator
    from openchatkit.inference.moderation.scorer import Scorer

    loader.silence_libraries()
    gpu_id = given.moderation_gpu_id if given.moderation_gpu_id is not None else getattr(given, "gpu_id", 0)
    try:
        loaded = loader.load(given.moderation_model, gpu_id=gpu_id, dtype=given.moderation_dtype, announce=announce)
        # Uncompiled: judging is reading, and what is compiled is the step that writes.
        engine = Engine(
            loaded.model,
            eos_ids=loaded.eos_ids,
            device=loaded.device,
            cache_dtype=loaded.cache_dtype,
            compile=False,
        )
        scorer = Scorer(engine, loaded.tokenizer)
    except UserError as error:
        raise UserError(f"the moderation model: {error}") from error
    made = ModelModerator(scorer, rules, name=given.moderation_model)
    made.try_out()
    return made
