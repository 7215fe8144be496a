"""`neox/deepy.py SCRIPT CONF...`: start a script of GPT-NeoX on the hosts and ranks that its configuration gives."""

import os
from collections.abc import Sequence
from pathlib import Path

from openchatkit import cli
from openchatkit.distributed import launcher, network
from openchatkit.errors import UserError
from openchatkit.neox import arguments, hosts, model, remote, translation
from openchatkit.neox.arguments import CommandLine, ConfigurationParser
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.hosts import Host
from openchatkit.paths import ROOT

# The scripts by both ages' names.
_TRAINING = ("train.py", "pretrain_gpt2.py")
_GENERATION = ("generate.py", "text_gen_gpt2.py")
_EVALUATION = ("eval.py", "evaluate.py", "eval_tasks/run.py")


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Check the configuration, start the ranks of each host, and wait for them; other scripts run here, in one process.

    Returns the exit status.
    """
    parser = ConfigurationParser(
        prog="neox/deepy.py",
        usage="%(prog)s SCRIPT [-d DIR] CONF... [-H HOSTFILE] [--KEY VALUE ...]",
        description="Start a script of GPT-NeoX on all ranks that its configuration files give.",
        epilog="Any setting of the files may be given as --KEY VALUE, which wins over them.",
    )
    parser.add_argument("script", metavar="SCRIPT", help=f"what to run: {_name_scripts()}")
    parser.add_files()
    parser.add_argument(
        "--print-commands", action="store_true", help="print the command of each host instead of starting them"
    )
    line = arguments.parse(parser, argv)
    script = _check_script(line.known.script)
    config = line.read_config()
    there = hosts.find_hosts(config)
    if script not in _TRAINING:
        _run_here(script, config, there)
        return 0
    ranks = sum(len(host.slots) for host in there)
    run = translation.translate(config, ranks=ranks, on_gpu=hosts.count_gpus() > 0)
    if run.model is not None and not line.known.print_commands and not model.is_written(run.model):
        model.write_model(run.model, config, resumes=False)
    program, given = ROOT / "neox" / "train.py", _rank_arguments(line, config, there)
    if len(there) == 1 and there[0].is_here and not config.get("force_multi") and not line.known.print_commands:
        if there[0].name is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, there[0].slots))
        return launcher.launch(program, given, world_size=ranks)
    commands = remote.make_commands(there, program, given, environment=remote.collect_environment())
    if line.known.print_commands:
        for each in commands:
            print(each.text if each.host.name is None else f"{each.host.name}: {each.text}")
        return 0
    by_slurm = config.get("launcher") == "slurm" or config.get("deepspeed_slurm")
    return remote.run_commands(commands, launcher="slurm" if by_slurm else "ssh", comment=config.get("comment"))


def _check_script(name: str) -> str:
    """Return the name of a script without its folder."""
    script = Path(name).name
    if script not in map(os.path.basename, (*_TRAINING, *_GENERATION, *_EVALUATION)):
        raise UserError(f"there is no script {name}: expected {_name_scripts()}")
    return script


def _name_scripts() -> str:
    *names, last = (*_TRAINING, *_GENERATION, *_EVALUATION)
    return f"{', '.join(names)} or {last}"


def _run_here(script: str, config: NeoxConfig, there: Sequence[Host]) -> None:
    """Generate or evaluate in this process, on the first of the GPUs that the hosts name here."""
    here = next((host for host in there if host.is_here and host.name is not None), None)
    if here is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(here.slots[0])
    if script in _GENERATION:
        from openchatkit.neox import generation

        generation.generate(config)
    else:
        from openchatkit.neox import evaluation

        evaluation.evaluate(config)


def _rank_arguments(line: CommandLine, config: NeoxConfig, there: Sequence[Host]) -> list[str]:
    """Return what each rank is given: the configuration, and where the ranks meet."""
    alone = len(there) == 1 and there[0].is_here
    address, port = config.get("master_addr") or ("127.0.0.1" if alone else there[0].name), config.get("master_port")
    if not port or (alone and "master_port" not in config.given):
        port = _find_port(port)
    return [*line.passed_on, f"--dist-url=tcp://{address}:{port}"]


def _find_port(wanted: int) -> int:
    """Return a free port of this machine: the wanted one, unless another run has it."""
    try:
        listener = network.listen("127.0.0.1", wanted)
    except UserError:
        listener = network.listen("127.0.0.1", 0)
    with listener:
        return int(listener.getsockname()[1])
