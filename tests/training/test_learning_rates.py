"""`training/learning_rates.py` by plain formulas; GPT-NeoX's two rules by its own values are in `tests/neox/`."""

import itertools
import math

import pytest

from openchatkit.errors import UserError
from openchatkit.training import config
from openchatkit.training.learning_rates import STYLES, LearningRates

PEAK, LOW, WARMUP, STEPS = 0.004, 0.001, 4, 24
RUN = ["--model-name", "m", "--task-name", "d", "--total-steps", "100"]


def rates(style="linear", count=STEPS, **options):
    found = LearningRates(PEAK, STEPS, style, **{"minimum": LOW, "warmup": WARMUP, **options})
    return [found.at(step) for step in range(count)]


def plan(*flags):
    settings = config.parse([*RUN, *flags])
    return settings.make_rates(settings.total_steps)


def test_the_rate_rises_linearly_and_falls_to_nearly_nothing_by_default():
    found = plan("--lr", "2", "--warmup-steps", "4")
    assert [found.at(step) for step in range(5)] == [0.5, 1, 1.5, 2, 2]
    assert [found.at(step) for step in range(4, 100)] == [2 * (100 - step) / 96 for step in range(4, 100)]
    assert found.at(99) > 0 == found.at(100) == found.at(150)
    assert plan("--lr", "2", "--total-steps", "1").at(0) == 2


@pytest.mark.parametrize("style", STYLES)
def test_every_style_warms_up_alike_starts_at_the_peak_and_stays_at_its_end(style):
    found = rates(style, count=40)
    assert found[:WARMUP] == pytest.approx([0.001, 0.002, 0.003, 0.004])
    assert found[WARMUP] == pytest.approx(PEAK)
    assert found[STEPS:] == pytest.approx([PEAK if style == "constant" else LOW] * 16)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(found[WARMUP:]))


def test_linear_and_cosine_are_straight_and_half_a_wave():
    done = [(step - WARMUP) / 20 for step in range(WARMUP, STEPS)]
    assert rates("linear")[WARMUP:] == pytest.approx([PEAK - 0.003 * share for share in done])
    assert rates("cosine")[WARMUP:] == pytest.approx(
        [LOW + 0.003 * (0.5 + 0.5 * math.cos(math.pi * share)) for share in done]
    )


def test_exponential_loses_the_same_share_at_each_step():
    found = rates("exponential", count=STEPS + 1)[WARMUP:]
    assert [after / before for before, after in itertools.pairwise(found)] == pytest.approx([0.25 ** (1 / 20)] * 20)


def test_wsd_is_stable_up_to_its_share_of_the_decay():
    found = rates("wsd", count=STEPS + 1, wsd_share=0.25)
    assert found[WARMUP:19] == [PEAK] * 15
    assert found[18:] == pytest.approx([PEAK - 0.0005 * step for step in range(7)])


def test_steps_of_decay_and_a_share_of_them_for_the_warm_up():
    found = plan("--lr-decay-steps", "40", "--warmup-fraction", "0.11", "--min-lr", "1e-6")
    assert (found.decay_steps, found.warmup) == (40, 4)
    assert found.at(99) == 1e-6
    assert plan("--lr-decay-steps", "40", "--warmup-fraction", "0.11", "--lr-rule", "neox").warmup == 0.11 * 40
    assert plan("--warmup-fraction", "0.1").warmup == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min-lr 1e-3 --lr 1e-4", "--min-lr 0.001 is above --lr 0.0001: make it smaller"),
        ("--lr-decay-steps 5 --warmup-steps 10", "--lr-decay-steps 5 is below --warmup-steps 10: make it larger"),
        ("--warmup-steps 5 --warmup-fraction 0.1", "--warmup-steps 5 and --warmup-fraction 0.1 exclude each other"),
        ("--warmup-fraction 1.5", "expected a share from 0 to 1, got '1.5'"),
        ("--wsd-decay-share 0", "expected a share above 0, got '0'"),
        ("--lr-decay-style exponential", "never comes to 0: give --min-lr"),
        ("--lr-decay-style wsd --lr-rule neox", "--lr-rule neox has no wsd: leave --lr-rule out"),
        ("--lr-rule neox-2021 --warmup-fraction 1", "--lr-rule neox-2021: the warm-up takes all 100 steps"),
        (
            "--lr-decay-style wsd --wsd-decay-share 0.5 --warmup-steps 60",
            "60 steps of warm-up and 50 of decay (--wsd-decay-share 0.5) do not fit in 100 steps: make one smaller",
        ),
        ("--checkpoint-growth 1", "expected at least 1.001, got '1'"),
        ("--checkpoint-growth 2 --checkpoint-steps 5", "--checkpoint-growth says when to save, in place of"),
        ("--extra-save-steps 10,0", "expected a whole number of at least 1, got '0'"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(flags, message):
    with pytest.raises(UserError) as caught:
        config.parse([*RUN, *flags.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_whose_length_the_data_decide_is_checked_once_it_is_known():
    flags = "--lr-decay-style wsd --wsd-decay-share 0.5 --warmup-steps 60 --nepochs 1"
    settings = config.parse([*RUN[:4], *flags.split()])
    with pytest.raises(UserError, match="do not fit in 100 steps"):
        settings.make_rates(100)
    assert settings.make_rates(200).wsd_steps == 100


def test_a_flag_of_the_warm_up_replaces_a_files(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("warmup_steps: 7\n")
    assert plan("--config", str(path), "--warmup-fraction", "0.2").warmup == 20
