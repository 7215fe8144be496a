"""The command `openchatkit`, or `python -m openchatkit`: the kit's programs by name, with their scripts' flags."""

import importlib
import sys
from collections.abc import Callable, Sequence

import openchatkit
from openchatkit import cli, paths
from openchatkit.errors import UserError

# Purpose, script, and the module of `main`.
COMMANDS = {
    "prepare": ("make layer shards of a base model", "pretrained/*/prepare.py", ""),
    "fetch": ("fetch and unpack data", "data/prepare_data.py", "download.command"),
    "preprocess": ("tokenise records into .bin and .idx", "tools/preprocess_data.py", "tools.preprocess.command"),
    "stores": ("count, merge and check token stores", "tools/stores.py", "tools.stores.command"),
    "tokenizer": ("train a tokenizer", "tools/train_tokenizer.py", "tools.tokenizer_training"),
    "inspect": ("show what training would be given", "tools/inspect_data.py", "tools.inspection.command"),
    "plan": ("say what training takes on a layout", "tools/plan_training.py", "tools.planning.command"),
    "train": ("fine-tune, one process a rank", "training/dist_clm_train.py", "training.command"),
    "deepy": ("train as GPT-NeoX's settings say", "neox/deepy.py", "neox.deepy"),
    "launch": ("start a process for each rank", "training/launch.py", "distributed.launcher"),
    "verify": ("verify checkpoints", "tools/verify_checkpoint.py", "tools.checkpoint_verification"),
    "plot": ("draw the curves of training runs", "tools/plot_training.py", "tools.plots"),
    "convert": ("make a Hugging Face model of a checkpoint", "tools/convert_to_hf_*.py", ""),
    "from-neox": ("make layer shards of GPT-NeoX's checkpoint", "tools/convert_from_neox.py", "convert.from_neox"),
    "to-neox": ("make GPT-NeoX's checkpoint of a model", "tools/convert_to_neox.py", "convert.to_neox"),
    "tensors": ("show a model's tensors, or compare two", "tools/inspect_checkpoint.py", "tools.checkpoint_inspection"),
    "upload": ("upload a model to the hub", "tools/upload_to_hub.py", "tools.hub_upload"),
    "evaluate": ("examine a model with lm-eval's tasks", "tools/run_evaluation.py", "tools.evaluation.harness"),
    "chat": ("chat with a model", "inference/bot.py", "inference.bot"),
    "serve": ("serve a model by OpenAI's API, with a page", "inference/server.py", "inference.server.command"),
    "moderate": ("judge texts", "inference/moderate.py", "inference.moderation.command"),
    "index": ("make and search an index of documents", "retrieval/build_index.py", "retrieval.command"),
}


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first argument names, with the others."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"openchatkit {openchatkit.__version__}")
    elif name in COMMANDS:
        find(name)(given[1:])
    else:
        raise UserError(f"there is no command {name!r}: expected one of {', '.join(COMMANDS)}")


def find(name: str) -> Callable[[Sequence[str]], None]:
    """Import the program of a command and return its `main`."""
    if name == "prepare":
        from openchatkit.convert import from_hf

        return from_hf.prepare_command(str(paths.PRETRAINED / "prepare.py"), "EleutherAI/pythia-1.4b-deduped")
    if name == "convert":
        from openchatkit.convert import to_hf

        # The last three are for checkpoints of the original kit.
        base = "EleutherAI/gpt-neox-20b"
        return to_hf.convert_command("convert", family=None, config_name=base, stages=8, layers_per_stage=6)
    module = importlib.import_module(f"openchatkit.{COMMANDS[name][2]}")
    return module.prepare_data if name == "fetch" else module.main


def usage() -> str:
    """Return the help of the command `openchatkit`."""
    lines = [f"  {name:10}  {what} ({script})" for name, (what, script, _) in COMMANDS.items()]
    head = "usage: openchatkit COMMAND [FLAGS]    (openchatkit COMMAND --help lists the flags)"
    return "\n".join([head, "", *lines])


if __name__ == "__main__":
    main()
