"""Learning rates, as a pure function of the step, and the flags that choose them.

The kit's own rule counts steps as trained: the first step of a warm-up over W has 1/W of the peak, and a step after the
last one of the decay would have the minimum. GPT-NeoX's two rules are followed to the bit, for its configurations.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from openchatkit.cli import natural, non_negative_float, positive_int, positive_share, share
from openchatkit.errors import UserError
from openchatkit.settings import setting

# Those of GPT-NeoX come first.
STYLES = ("linear", "cosine", "exponential", "constant", "wsd")
RULES = ("kit", "neox", "neox-2021")

_LN2 = 0.693  # as GPT-NeoX has it
_UNKNOWN = 1 << 60  # steps that any warm-up and decay fit in


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a run. `warmup` and `decay_steps` are counted in steps from its start.

    `warmup` need not be whole with GPT-NeoX's rules. The rate falls from the end of the warm-up to step `decay_steps`,
    with wsd (warm-up, stable, decay) in the last `wsd_share` of the decay steps alone. It stays as it is after that.
    """

    peak: float
    decay_steps: int
    style: str = "linear"
    minimum: float = 0.0
    warmup: float = 0
    wsd_share: float = 0.1
    rule: str = "kit"

    def at(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0."""
        return {"kit": self._own_rate, "neox": self._neox_rate, "neox-2021": self._neox_rate_of_2021}[self.rule](step)

    @property
    def wsd_steps(self) -> int:
        """Number of steps in which the rate falls with wsd."""
        return max(round(self.decay_steps * self.wsd_share), 1)

    def _own_rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        length = max(self.decay_steps - self.warmup, 1)
        left = max(self.decay_steps - step, 0)
        fall = self.peak - self.minimum
        if self.style == "constant":
            return self.peak
        if self.style == "cosine":
            return self.minimum + fall / 2 * (1 - math.cos(math.pi * left / length))
        if self.style == "exponential":
            return self.minimum * math.pow(self.peak / self.minimum, left / length)
        if self.style == "wsd":
            length = self.wsd_steps
            left = min(left, length)
        return self.minimum + fall * left / length

    def _neox_rate(self, step: int) -> float:
        """Return the rate of GPT-NeoX's rule since May 2026; its cosine is that of August 2023."""
        number = min(step, self.decay_steps)
        if self.warmup and number <= self.warmup:
            return self.peak * max(number, 1) / self.warmup
        length = self.decay_steps - self.warmup
        done = number - self.warmup
        if self.style == "cosine":
            return self.minimum + (self.peak - self.minimum) / 2 * (1 + math.cos(math.pi * done / length))
        return max(self._neox_fall(done, length), self.minimum)

    def _neox_rate_of_2021(self, step: int) -> float:
        """Return the rate of GPT-NeoX's rule until August 2023, with which GPT-NeoX-20B and Pythia were trained.

        The first update does nothing, and the last ones, as many as the warm-up has, are all of one rate.
        """
        number = min(step, self.decay_steps - self.warmup)
        if self.warmup and number <= self.warmup:
            return self.peak * number / self.warmup
        done, length = number - self.warmup, self.decay_steps
        if self.style == "cosine":
            return max(self.peak / 2 * (1 + math.cos(math.pi * done / length)), self.minimum)
        return max(self._neox_fall(done, length), self.minimum)

    def _neox_fall(self, done: float, length: float) -> float:
        """Return the rate after `done` of `length` steps of a fall whose end is not the minimum."""
        if self.style == "linear":
            return self.peak * (length - done) / length
        return self.peak if self.style == "constant" else self.peak * math.exp(-_LN2 * done / length)


@dataclass(frozen=True, kw_only=True)
class LearningRateSettings:
    """How large the steps are. A resume with other values says which ones."""

    title: ClassVar[str] = "learning rate"
    lr: float = setting(1e-5, check=non_negative_float, help="peak learning rate")
    min_lr: float = setting(0.0, check=non_negative_float, help="what it falls to")
    lr_decay_style: str = setting(
        "linear",
        choices=STYLES,
        help="how it falls after the warm-up; `exponential` loses the same share at each step, `wsd` stays at the peak "
        "and falls linearly at the end",
    )
    lr_decay_steps: int | None = setting(
        None,
        check=positive_int,
        help="steps until it has fallen, those of the warm-up included; not given: the run's",
    )
    warmup_steps: int = setting(0, check=natural, help="steps of linear rise to the peak")
    warmup_fraction: float | None = setting(
        None, check=share, help="share of `--lr-decay-steps`, instead of `--warmup-steps`"
    )
    wsd_decay_share: float = setting(0.1, check=positive_share, help="share of `--lr-decay-steps` in which `wsd` falls")
    lr_rule: str = setting(
        "kit",
        choices=RULES,
        help="the formula, to the step: GPT-NeoX's of today is `neox`, that of GPT-NeoX-20B and Pythia `neox-2021`; "
        "see [docs/neox.md](../docs/neox.md)",
    )

    def make_rates(self, total_steps: int | None) -> LearningRates:
        """Return the learning rates of a run of so many steps; None: not known yet.

        UserError for what cannot be, as far as the number of steps decides it.
        """
        self._check_rates()
        decay_steps = self.lr_decay_steps or total_steps or _UNKNOWN
        warmup: float = self.warmup_steps
        if self.warmup_fraction is not None:
            warmup = self.warmup_fraction * decay_steps
            warmup = round(warmup) if self.lr_rule == "kit" else warmup
        rates = LearningRates(
            peak=self.lr,
            decay_steps=decay_steps,
            style=self.lr_decay_style,
            minimum=self.min_lr,
            warmup=warmup,
            wsd_share=self.wsd_decay_share,
            rule=self.lr_rule,
        )
        if self.lr_decay_steps is not None and warmup > decay_steps:
            raise UserError(f"--lr-decay-steps {decay_steps} is below --warmup-steps {warmup:g}: make it larger")
        if self.lr_rule != "kit" and warmup >= decay_steps:
            raise UserError(f"--lr-rule {self.lr_rule}: the warm-up takes all {decay_steps} steps: make it shorter")
        if self.lr_decay_style == "wsd" and rates.wsd_steps > decay_steps - warmup:
            raise UserError(
                f"--lr-decay-style wsd: {warmup} steps of warm-up and {rates.wsd_steps} of decay "
                f"(--wsd-decay-share {self.wsd_decay_share:g}) do not fit in {decay_steps} steps: make one smaller"
            )
        return rates

    def _check_rates(self) -> None:
        """Raise UserError for settings that exclude each other however long the run is."""
        if self.warmup_fraction is not None and self.warmup_steps:
            raise UserError(
                f"--warmup-steps {self.warmup_steps} and --warmup-fraction {self.warmup_fraction:g} exclude each "
                "other: give one of them"
            )
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}: make it smaller")
        if self.lr_rule == "kit" and self.lr_decay_style == "exponential" and not self.min_lr:
            raise UserError("--lr-decay-style exponential never comes to 0: give --min-lr, a tenth of --lr for example")
        if self.lr_rule != "kit" and self.lr_decay_style == "wsd":
            raise UserError(f"--lr-rule {self.lr_rule} has no wsd: leave --lr-rule out, or use --lr-decay-style linear")
