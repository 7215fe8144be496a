"""How a step changes the weights: the flags that choose the optimizer and the loss scale, and what excludes what.

Imports no torch, as all flags do; `optimizer` makes the optimizer of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from openchatkit.cli import below_one, non_negative_float, positive_float, positive_int
from openchatkit.errors import UserError
from openchatkit.settings import setting

OPTIMIZERS = ("adam", "adamw", "8bit-adam", "lion", "madgrad", "sm3")
_ADAMS = OPTIMIZERS[:3]

# Constants that depend on the optimizer where they are not given; those of Lion, MADGRAD and SM3 are GPT-NeoX's.
_CONSTANTS = {"adam_beta2": 0.999, "adam_eps": 1e-6, "momentum": 0.0}
_OTHER_CONSTANTS = {"lion": {"adam_beta2": 0.99}, "madgrad": {"momentum": 0.9}, "sm3": {"adam_eps": 1e-30}}

# Forms of an optimizer's state of which each can be made of the other; see `name_moments`.
CONVERTIBLE = {"float32", "bf16"}


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How a step changes the weights. A resume with other values says which ones."""

    title: ClassVar[str] = "optimization"
    optimizer: str = setting(
        "adamw",
        choices=OPTIMIZERS,
        help="Adam with weight decay in the gradient, or apart from it as in all that follow; `8bit-adam` is `adamw` "
        "with `--optimizer-state 8bit`, `lion` steps by signs, `madgrad` averages from the first weights on, `sm3` "
        "keeps state by row and column alone, and needs whole matrices: `--dp-mode allreduce`, no tensor groups",
    )
    optimizer_state: str = setting(
        "float32",
        choices=("float32", "bf16", "8bit"),
        help="what Adam keeps its two moments in: 8, 4 or 2 bytes a parameter. `bf16` rounds at random, so that small "
        "changes add up; `8bit` has a scale for each 256 elements, and needs bitsandbytes",
    )
    use_offload: bool = setting(
        False,
        help="keep float32 weights and the optimizer's state in main memory, and take the step on the processor; a GPU "
        "then holds gradients and what layers compute with",
    )
    adam_beta1: float = setting(0.9, check=below_one, help="decay of the first moment, also of `lion`'s")
    adam_beta2: float = setting(
        check=below_one, help="decay of the second moment; not given: 0.999. With `lion` of the one there is: 0.99"
    )
    adam_eps: float = setting(
        check=non_negative_float, help="added to the root of the second moment; not given: 1e-6, with `sm3` 1e-30"
    )
    momentum: float = setting(
        check=below_one,
        help="with `madgrad` the share of its old value that a weight keeps, not given: 0.9; with `sm3` that of the "
        "last change, not given: 0",
    )
    sm3_beta: float = setting(0.0, check=below_one, help="decay of `sm3`'s sums; 0: they only grow")
    weight_decay: float = setting(
        0.01, check=non_negative_float, help="of matrices; biases and norms have none, nor has anything with `sm3`"
    )
    max_grad_norm: float = setting(
        1.0, check=non_negative_float, help="the model's gradient norm is clipped to this; 0: never"
    )
    precision: str = setting(
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of products; not given: float32. `auto` is bfloat16 where the hardware of every rank computes in it "
        "(GPUs with units for it, CPUs with AVX-512-BF16 or AMX), else float32. What was taken is in the log and in "
        "each checkpoint",
    )
    bf16: bool = setting(
        False, help="the same as `--precision bfloat16`; where the hardware emulates it, the log says what that costs"
    )
    fp16: bool = setting(False, help="the same as `--precision float16`, with a loss scale")
    loss_scale: float = setting(0, check=non_negative_float, help="a fixed loss scale; 0: dynamic, as the next six say")
    initial_loss_scale: float = setting(32768, check=positive_float, help="the scale of the first step")
    min_loss_scale: float = setting(1, check=positive_float, help="it never halves below this")
    loss_scale_window: int = setting(1000, check=positive_int, help="good steps before it doubles")
    hysteresis: int = setting(
        2,
        check=positive_int,
        help="overflows before it halves; until it has doubled again, each further one halves it",
    )
    consecutive_hysteresis: bool = setting(
        False, help="`--hysteresis` counts overflows in a row: a good step starts it again"
    )
    end_at_min_loss_scale: bool = setting(
        False, help="end the run when a gradient overflows at `--min-loss-scale`, where it would halve"
    )
    max_overflows: int | None = setting(
        None,
        check=positive_int,
        help="end the run after so many steps in a row whose gradient is not finite; not given: after 20 that no lower "
        "loss scale could have helped",
    )

    @property
    def moments(self) -> str:
        """Form of the state that the optimizer keeps; see `name_moments`."""
        return name_moments(self.optimizer, self.optimizer_state, self.momentum)

    def check_optimization(self) -> None:
        """Raise UserError for values that exclude each other."""
        if self.min_loss_scale > self.initial_loss_scale:
            raise UserError(
                f"--min-loss-scale {self.min_loss_scale:g} is above --initial-loss-scale "
                f"{self.initial_loss_scale:g}: make it smaller"
            )
        if self.optimizer == "8bit-adam" and self.optimizer_state == "bf16":
            raise UserError(
                "--optimizer 8bit-adam keeps its state in 8 bits: leave --optimizer-state out, or use adamw"
            )
        if self.optimizer not in _ADAMS and self.optimizer_state != "float32":
            raise UserError(
                f"--optimizer {self.optimizer} keeps its state in float32: leave --optimizer-state out, or use adamw"
            )
        if self.optimizer in ("madgrad", "sm3") and not self.adam_eps:
            raise UserError(
                f"--optimizer {self.optimizer} divides by --adam-eps where a gradient was always 0: leave it out"
            )
        for name, value, users in (
            ("--momentum", self.momentum, ("madgrad", "sm3")),
            ("--sm3-beta", self.sm3_beta, ("sm3",)),
        ):
            if value and self.optimizer not in users:
                raise UserError(
                    f"{name} {value:g} is of --optimizer {' or '.join(users)}, not of {self.optimizer}: leave it out"
                )


def fill_constants(values: dict[str, Any]) -> None:
    """Fill in the optimizer's constants that are not given, in settings by name."""
    for name, value in (_CONSTANTS | _OTHER_CONSTANTS.get(values["optimizer"], {})).items():
        values.setdefault(name, value)


def name_moments(optimizer: str, state: str, momentum: float) -> str:
    """Return the form of the state that an optimizer keeps, by its flags: a key of `plan.memory.MOMENTS`."""
    if optimizer in _ADAMS:
        return "8bit" if optimizer == "8bit-adam" else state
    return optimizer if momentum or optimizer == "lion" else f"{optimizer} without momentum"


def format_flags(values: Mapping[str, Any]) -> str:
    """Return the flags that make an optimizer keep the state it does, in settings by name."""
    name = values["optimizer"]
    if name in ("madgrad", "sm3"):
        return f"--optimizer {name} --momentum {values['momentum']:g}"
    return f"--optimizer {name}" + (f" --optimizer-state {values['optimizer_state']}" if name in _ADAMS[:2] else "")
