"""`data.blending`: turns against those that GPT-NeoX's own code computed, and against its rule sample by sample."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from openchatkit.data import blending
from openchatkit.data.blending import blend

_PATH = Path(__file__).parent / "samples" / "neox_golden.json"
GOLDEN = json.loads(_PATH.read_text(encoding="utf-8"))["blending"]


def blend_one_by_one(weights: list[float], length: int) -> list[int]:
    """The rule as it is written down."""
    shares = np.array([weight / sum(weights) for weight in weights])
    shares /= shares.sum()
    given = np.zeros(len(weights))
    turns = []
    for number in range(length):
        turns.append(int(np.argmax(shares * max(number, 1) - given)))
        given[turns[-1]] += 1
    return turns


@pytest.mark.parametrize(("weights", "sources", "_numbers"), GOLDEN, ids=lambda value: str(len(value)))
def test_turns_are_gpt_neox_s_own(weights: list[float], sources: list[int], _numbers: list[int]) -> None:
    assert np.concatenate(list(blend(weights, len(sources)))).tolist() == sources


@pytest.mark.parametrize(
    "weights",
    [
        [2.5],
        [1.0] * 7,
        [1, 1e-3, 1e-4],
        [2.0**-number for number in range(12)],
        random.Random(3).choices(range(1, 1000), k=40),
    ],
    ids=lambda weights: f"{len(weights)}-sources",
)
def test_stretches_side_by_side_are_the_rule_one_by_one(weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    # Short ones, so that many begin with counts that turn out wrong, and several pieces.
    monkeypatch.setattr(blending, "_STRETCH", 40)
    monkeypatch.setattr(blending, "_STRETCHES", 60)
    monkeypatch.setattr(blending, "_AHEAD", 3)
    assert np.concatenate(list(blend(weights, 6007))).tolist() == blend_one_by_one(weights, 6007)
