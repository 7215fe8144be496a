"""Settings of sparse attention, by GPT-NeoX's names. Imports no torch; `sparse_attention` makes layouts of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from openchatkit.errors import UserError

SPARSE_KINDS = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")


@dataclass(frozen=True)
class Sparsity:
    """Settings of sparse layers, by GPT-NeoX's names; None stands for the default of a kind.

    `seed` is that of random blocks: each layer has its own, drawn from it.
    """

    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int | None = None
    num_global_blocks: int = 1
    num_different_global_patterns: int = 1
    num_random_blocks: int | None = None
    num_sliding_window_blocks: int | None = None
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            "block": (self.block, 1),
            "num_local_blocks": (self.num_local_blocks, 1),
            "num_global_blocks": (self.num_global_blocks, 0),
            "num_different_global_patterns": (self.num_different_global_patterns, 1),
            "num_random_blocks": (self.num_random_blocks, 0),
            "num_sliding_window_blocks": (self.num_sliding_window_blocks, 1),
            "seed": (self.seed, 0),
        }
        for name, (value, least) in counts.items():
            if value is not None and (type(value) is not int or value < least):
                raise _refuse(name, value, f"a whole number of at least {least}")
        lists = {
            "local_window_blocks": (self.local_window_blocks, 1),
            "global_block_indices": (self.global_block_indices, 0),
        }
        if self.global_block_end_indices is not None:
            lists["global_block_end_indices"] = (self.global_block_end_indices, 1)
        for name, (values, least) in lists.items():
            if not isinstance(values, tuple) or any(type(value) is not int or value < least for value in values):
                raise _refuse(name, values, f"a list of whole numbers of at least {least}")
        if type(self.different_layout_per_head) is not bool:
            raise _refuse("different_layout_per_head", self.different_layout_per_head, "true or false")
        if not self.local_window_blocks:
            raise _refuse("local_window_blocks", [], "at least one window")
        ends = self.global_block_end_indices
        if ends is not None and (
            len(ends) != len(self.global_block_indices)
            or any(end <= start for start, end in zip(self.global_block_indices, ends, strict=True))
        ):
            raise _refuse(
                "global_block_end_indices", list(ends), "an end, exclusive, after each of global_block_indices"
            )

    def count_random_blocks(self, kind: str) -> int:
        """Return how many random blocks a row of a kind's layout has at most."""
        if kind not in ("sparse_variable", "bigbird"):
            return 0
        default = 1 if kind == "bigbird" else 0
        return default if self.num_random_blocks is None else self.num_random_blocks

    def check(self, kind: str) -> None:
        """UserError where the settings do not make a layout of a kind."""
        if kind != "sparse_fixed":
            return
        window, patterns = self.num_local_blocks or 4, self.num_different_global_patterns
        if self.num_global_blocks < 1 or window % self.num_global_blocks:
            raise _refuse("num_global_blocks", self.num_global_blocks, f"a divisor of num_local_blocks {window}")
        if patterns > 1 and not self.different_layout_per_head:
            raise _refuse("num_different_global_patterns", patterns, "1 unless different_layout_per_head is true")
        if patterns > window // self.num_global_blocks:
            raise _refuse(
                "num_different_global_patterns",
                patterns,
                f"at most num_local_blocks / num_global_blocks = {window // self.num_global_blocks}",
            )


def read_sparsity(settings: Mapping[str, Any]) -> Sparsity:
    """Return the settings that a `sparsity_config` gives; UserError for a name or a value that makes no sense."""
    known = [field.name for field in fields(Sparsity)]
    for name in settings:
        if name not in known:
            raise UserError(f"sparsity_config: {name} is not known; the settings are {', '.join(known)}")
    frozen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Sparsity(**frozen)


def _refuse(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"sparsity_config: {name} is {value!r}, expected {expected}")
