"""The trainer's two rules of GPT-NeoX for learning rates, by values that GPT-NeoX's own code computed."""

import pytest
from neox_cases import GOLDEN

from openchatkit.training.learning_rates import LearningRates

GIVEN = GOLDEN["lr"]


@pytest.mark.parametrize(("rule", "age"), [("neox", "now"), ("neox-2021", "2021")])
@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "constant"])
def test_learning_rates_are_gpt_neox_s_own(rule, age, style):
    steps = GIVEN["iters"]
    rates = LearningRates(GIVEN["peak"], steps, style, GIVEN["min"], warmup=GIVEN["warmup"] * steps, rule=rule)
    assert [rates.at(step) for step in range(steps + 1)] == GIVEN[age][style]
    assert rates.at(steps + 20) == rates.at(steps)


@pytest.mark.parametrize("rule", ["neox", "neox-2021"])
def test_without_a_warm_up_the_first_step_is_at_the_peak(rule):
    assert LearningRates(0.1, 10, "cosine", rule=rule).at(0) == 0.1
