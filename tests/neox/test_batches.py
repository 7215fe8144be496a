"""Batch sizes, by the rules of GPT-NeoX's own table."""

import re

import pytest

from openchatkit.errors import UserError
from openchatkit.neox.batches import BatchSizes, count_replicas, derive

NULL = "null"


def settings(total: object = None, micro: object = None, accumulation: object = None) -> dict[str, object]:
    given = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    return {"train_micro_batch_size_per_gpu": None} | {
        name: value for name, value in given.items() if value is not None
    }


@pytest.mark.parametrize(
    ("given", "replicas", "expected"),
    [
        (settings(micro=4), 2, (8, 4, 1)),
        (settings(micro=4, accumulation=32), 12, (1536, 4, 32)),
        (settings(total=32), 4, (32, 8, 1)),
        (settings(total=32, accumulation=2), 4, (32, 4, 2)),
        (settings(total=32, micro=8), 4, (32, 8, 1)),
        (settings(total=64, micro=8, accumulation=2), 4, (64, 8, 2)),
    ],
)
def test_what_is_not_given_is_derived(configure, given, replicas, expected):
    assert derive(configure(**given), replicas) == BatchSizes(*expected, replicas)


def test_accumulation_is_derived_where_it_is_null(write, configure):
    config = configure(**settings(total=64, micro=8))
    with pytest.raises(UserError, match="make gradient_accumulation_steps 2"):
        derive(config, 4)
    from openchatkit.neox.config import NeoxConfig

    path = write(
        "n.yml", {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": None}
    )
    assert derive(NeoxConfig.read([str(path)]), 4) == BatchSizes(64, 8, 2, 4)


@pytest.mark.parametrize("total", [1, 7, 30, 33, 100])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("given", [{}, {"micro": 3}, {"accumulation": 4}, {"micro": 2, "accumulation": 5}])
def test_the_numbers_of_the_message_fit(configure, total, replicas, given):
    try:
        found = derive(configure(**settings(total, **given)), replicas)
        assert found.total == total == found.micro * found.accumulation * replicas
    except UserError as error:
        name, numbers = re.search(r": make (\w+) (.*)$", str(error)).groups()
        for number in map(int, numbers.split(" or ")):
            changed = {"train_batch_size": {"total": number}, "gradient_accumulation_steps": {"accumulation": number}}
            derive(configure(**settings(**{"total": total, **given, **changed[name]})), replicas)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (settings(), "give train_micro_batch_size_per_gpu, train_batch_size or both"),
        (settings(micro=-1), r"train_micro_batch_size_per_gpu -1: expected at least 1"),
        (settings(micro=2, accumulation=0), r"gradient_accumulation_steps 0: expected at least 1"),
    ],
)
def test_mistakes(configure, given, message):
    with pytest.raises(UserError, match=message):
        derive(configure(**given), 2)


def test_replicas(configure):
    config = configure(pipe_parallel_size=4, model_parallel_size=2)
    assert count_replicas(config, 96) == 12
    with pytest.raises(UserError, match=r"20 ranks are no multiple of .* 4 x .* 2 = 8: use 16 or 24 ranks"):
        count_replicas(config, 20)
    with pytest.raises(UserError, match=r"4 ranks are no multiple of .* = 8: use 8 ranks"):
        count_replicas(config, 4)
    assert count_replicas(configure(pipe_parallel_size=0), 3) == 3
