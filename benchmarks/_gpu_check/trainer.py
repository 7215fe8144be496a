"""The training command itself on one rank: precisions, 8-bit Adam, being stopped and killed, and running out of memory.

On a GPU the runs whose bits must agree use torch's deterministic algorithms; whether two runs agree without them is
measured. Runs share the GPU, so nothing is timed here.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from _gpu_check.rows import Context, Result, Skip
from openchatkit.formats import checkpoint, metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.shards import shard_names
from openchatkit.paths import ROOT
from openchatkit.tools.quickstart import base_model
from openchatkit.training.config import build_parser

COMMAND = ROOT / "training" / "dist_clm_train.py"
STEPS, SAVE_EVERY = 40, 15
# After this step it is asked to stop, and when it has been started again, killed.
STOP_AFTER, KILL_AFTER = 8, 22
RESUMABLE = 75
# Where the trainer has no flag for it.
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True)
torch.backends.cuda.enable_cudnn_sdp(False)
from openchatkit.training.command import main
main(sys.argv[1:])
"""
Flags = Mapping[str, object]


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, the end of what it wrote to stderr, and its checkpoints' folder."""

    status: int
    said: str
    folder: Path


def run(context: Context) -> None:
    """Start the runs side by side on a GPU, one after another on the CPU, and report each as it ends."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(4 if context.cuda else 1) as pool:
        runs = Runs(context, Path(name))
        deterministic = context.cuda
        plain = pool.submit(runs.train, "bf16", {"bf16": True})
        fp16 = pool.submit(runs.train, "fp16", {"fp16": True, "initial_loss_scale": 1024})
        eight = pool.submit(runs.train, "8bit", {"bf16": True, "optimizer": "8bit-adam"})
        # On the CPU every run is deterministic.
        whole = pool.submit(runs.train, "whole", {"bf16": True}, deterministic=True) if deterministic else plain
        broken = pool.submit(runs.interrupt, {"bf16": True}, deterministic=deterministic)
        again = pool.submit(runs.train, "again", {"bf16": True}) if context.cuda else plain
        context.check("bf16", lambda result: learnt(result, plain.result()))
        context.check("fp16", lambda result: learnt(result, fp16.result()))
        context.check("8-bit Adam", lambda result: learnt(result, bitsandbytes(eight.result())))
        context.check("SIGTERM in a step", lambda result: stopped(result, broken.result()[0]))
        context.check("kill -9 in a step", lambda result: killed(result, broken.result()[1]))
        context.check("resumed, against unstopped", lambda r: same_bits(r, whole.result(), broken.result()[2]))
        context.check(
            "bf16 twice, as it is",
            lambda r: same_bits(r, plain.result(), again.result(), required=False),
            needs_cuda=True,
        )
        context.check("out of memory", lambda result: out_of_memory(result, runs), needs_cuda=True)


class Runs:
    """A small model, chats to train it on, and the runs on them; made in `folder`."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.folder = context, folder
        chats = folder / "chats.jsonl"
        write_chats(chats)
        width, layers, self.length = context.pick((64, 2, 64), (256, 6, 512))
        shape = base_model.ModelShape(
            vocab_size=1024,
            hidden_size=width,
            num_layers=layers,
            num_heads=4,
            intermediate_size=4 * width,
            max_positions=4096,
        )
        self.model, _ = base_model.prepare(chats, folder / "model", shape=shape, seed=1)
        self.flags = {
            "model_name": self.model,
            "task_name": chats,
            "data_cache": folder / "cache",
            "use_cuda": "true" if context.cuda else "false",
            "seq_length": self.length,
            "packing": "documents",
            "batch_size": 8,
            "micro_batch_size": 4,
            "total_steps": STEPS,
            "checkpoint_steps": SAVE_EVERY,
            "lr": 1e-3,
        }

    def train(self, name: str, flags: Flags, *, deterministic: bool = False) -> Ended:
        """Run the command to its end."""
        return self._finish(*self._start(name, flags, deterministic))

    def interrupt(self, flags: Flags, *, deterministic: bool) -> tuple[Ended, Ended, Ended]:
        """Run it, ask it to stop, start it again, kill it, and start it again to the end."""
        ended = []
        for sign, after in ((signal.SIGTERM, STOP_AFTER), (signal.SIGKILL, KILL_AFTER)):
            process, log, folder = self._start("broken", flags, deterministic)
            while process.poll() is None and steps_done(folder) < after:
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(sign)
            ended.append(self._finish(process, log, folder))
        return (*ended, self.train("broken", flags, deterministic=deterministic))

    def _start(self, name: str, flags: Flags, deterministic: bool) -> tuple[subprocess.Popen, Path, Path]:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        flags = {**self.flags, **flags, "checkpoint_path": folder}
        program = [str(COMMAND)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if deterministic:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            if "--deterministic" in build_parser().format_help():
                flags["deterministic"] = True
            else:
                program = ["-c", DETERMINISTIC]
        log = folder / "stderr"
        with open(log, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *program, *to_argv(flags)],
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        return process, log, folder

    def _finish(self, process: subprocess.Popen, log: Path, folder: Path) -> Ended:
        try:
            process.wait(timeout=max(self.context.left(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return Ended(process.returncode, log.read_text(encoding="utf-8", errors="replace")[-2000:], folder)


def write_chats(path: Path) -> None:
    """Chats of made-up words, of very different lengths."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(800)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(600):
            question, answer = (" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(2))
            file.write(json.dumps({"text": f"<human>: {question}\n<bot>: {answer}\n"}) + "\n")


def to_argv(flags: Flags) -> list[str]:
    """{"batch_size": 8, "bf16": True} -> ["--batch-size", "8", "--bf16"]."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return [part for flag, value in pairs for part in ([flag] if value is True else [flag, str(value)])]


def steps_done(folder: Path) -> int:
    """The last step that a run has reported."""
    return max((row["step"] for row in metrics.read(folder)), default=0)


def last_line(ended: Ended) -> str:
    """The last line of a run's stderr, for reasons."""
    return (ended.said.strip().splitlines() or ["nothing on stderr"])[-1][:200]


def learnt(result: Result, ended: Ended) -> None:
    """Require a run to have ended well, with every step, all of them applied, and a falling loss."""
    result.values["exit status"] = ended.status
    result.require(ended.status == 0, f"exit status {ended.status}: {last_line(ended)}")
    found = metrics.read(ended.folder)
    losses = [row["loss"] for row in found]
    result.values["first loss"], result.values["last loss"] = losses[0], losses[-1]
    result.values["loss scale"] = found[-1]["loss_scale"]
    result.require([row["step"] for row in found] == list(range(1, STEPS + 1)), f"{len(found)} steps of {STEPS}")
    unapplied = sum(row["grad_norm"] is None for row in found)
    result.require(unapplied == 0, f"{unapplied} steps had a gradient that is not finite")
    result.require(losses[-1] < losses[0] - 0.3, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")


def bitsandbytes(ended: Ended) -> Ended:
    """The run with 8-bit Adam, unless there is no bitsandbytes to run it."""
    if ended.status and "needs bitsandbytes" in ended.said:
        raise Skip("bitsandbytes is missing")
    return ended


def stopped(result: Result, ended: Ended) -> None:
    """Require status 75, and that a run says at which step it stopped and how to go on."""
    result.values["exit status"] = ended.status
    result.require(ended.status == RESUMABLE, f"exit status {ended.status}: {last_line(ended)}")
    said = re.search(rf"stopped after step (\d+) of {STEPS}.*the same command goes on from there", ended.said)
    result.require(said is not None, f"it said: {last_line(ended)}")
    result.values["stopped after step"] = int(said[1])
    result.require(STOP_AFTER <= int(said[1]) < STEPS, "it stopped at another step than it was asked at")


def killed(result: Result, ended: Ended) -> None:
    """Require the run to have gone on from a checkpoint, and to have been killed by the signal before its end."""
    result.values["exit status"] = ended.status
    result.require(ended.status == -signal.SIGKILL, f"exit status {ended.status}: {last_line(ended)}")
    result.require("resuming from" in ended.said, "it did not go on from a checkpoint")


def same_bits(result: Result, one: Ended, other: Ended, *, required: bool = True) -> None:
    """Compare all weights and optimizer tensors of two runs' last checkpoints."""
    for ended in (one, other):
        result.require(ended.status == 0, f"exit status {ended.status}: {last_line(ended)}")
    found, wanted = (tensors(checkpoint.latest(ended.folder)) for ended in (one, other))
    result.require(found.keys() == wanted.keys() and len(found) > 0, "the checkpoints hold different tensors")
    differing = [name for name in found if not torch.equal(found[name], wanted[name])]
    result.values["tensors"], result.values["tensors that differ"] = len(found), len(differing)
    if required:
        result.require(not differing, f"{len(differing)} of {len(found)} tensors differ, as {differing[:1]}")


def tensors(path: Path) -> dict[str, Tensor]:
    """All weights and optimizer tensors of a checkpoint."""
    found = {}
    for shard in shard_names(LayerShards(path).config.num_layers):
        found |= {f"{shard}/{name}": tensor for name, tensor in checkpoint.read_weights(path, shard).items()}
        for name, entry in checkpoint.read_optimizer(path, shard).items():
            found |= {f"{shard}/{name}/{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
    return found


def out_of_memory(result: Result, runs: Runs) -> None:
    """Leave a run too little of the GPU's memory, and require one line that says what to do and status 2."""
    left = 3 << 29  # enough for torch to start
    taken = torch.empty(max(torch.cuda.mem_get_info()[0] - left, 0), dtype=torch.uint8, device="cuda")
    large = {"bf16": True, "batch_size": 64, "micro_batch_size": 64, "seq_length": 4096}
    ended = runs.train("memory", large | {"activation_checkpointing": "false", "packing": "concat"})
    del taken
    result.values["exit status"] = ended.status
    result.require(ended.status == 2, f"exit status {ended.status}: {last_line(ended)}")
    result.require("ran out of GPU memory: use a smaller" in ended.said, f"it said: {last_line(ended)}")
    result.require("Traceback" not in ended.said, "it printed a traceback")
