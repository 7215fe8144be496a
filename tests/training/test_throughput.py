"""`training/throughput.py`: operations of a step against the rate of the hardware."""

import dataclasses

import pytest
import torch
from model_configs import NEOX

from openchatkit.distributed.layout import Layout
from openchatkit.loading import hardware
from openchatkit.training import config
from openchatkit.training.throughput import count_operations, find_peak_rate

FLAGS = ["--model-name", "m", "--task-name", "d", "--total-steps", "9", "--seq-length", "64", "--batch-size", "8"]


def settings(*flags: str) -> config.Settings:
    return config.parse([*FLAGS, *flags])


CONFIG = dataclasses.replace(NEOX, vocab_size=512, hidden_size=64, intermediate_size=256)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--micro-batch-size", "2", "--activation-checkpointing", "false"),
        ("--pipeline-group-size", "2", "--pp-mode", "1f1b", "--micro-batch-size", "2"),
        ("--tensor-group-size", "2", "--activation-checkpointing", "selective"),
        ("--data-group-size", "2", "--batch-size", "4", "--micro-batch-size", "4"),
        ("--gradient-accumulate-step", "2", "--batch-size", "4", "--micro-batch-size", "4"),
    ],
    ids=lambda flags: " ".join(flags) or "plain",
)
def test_operations_are_those_of_the_formula_on_any_layout(flags):
    """6 N + 6 L H T for each token, where N are the numbers of the layers' matrices and of the output layer."""
    matrices = 4 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256) + 512 * 64
    assert count_operations(settings(*flags), CONFIG) == 8 * 64 * (6 * matrices + 6 * 4 * 64 * 64)


def test_a_stated_rate_is_of_each_rank():
    layout = Layout(0, torch.device("cpu"), pipeline_size=3)
    assert find_peak_rate(settings("--peak-tflops", "2.5"), layout, torch.float32, steps=1) == 7.5e12


def test_a_short_run_measures_nothing_and_a_long_one_does():
    layout = Layout(0, torch.device("cpu"))
    assert find_peak_rate(settings(), layout, torch.float32, steps=19) is None
    assert find_peak_rate(settings(), layout, torch.float32, steps=20) > 0


def test_large_products_are_not_measured_for_long():
    assert hardware.matrix_rate(torch.device("cpu"), torch.float32, seconds=0.0) > 0


def test_memory_in_use_grows_with_what_is_filled():
    before = hardware.main_memory_in_use()
    held = torch.ones(1 << 26)
    assert hardware.main_memory_in_use() - before > held.nbytes / 2
