"""One GPT-NeoX configuration: its merged settings, old spellings resolved, and what becomes of each of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.neox import files, keys
from openchatkit.neox.files import GivenValue

# GPT-NeoX's names of precisions, and the trainer's.
PRECISIONS = {"fp16": "float16", "bfloat16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class NeoxConfig:
    """Settings by key. `files` are those they were read from, in order."""

    given: Mapping[str, GivenValue]
    files: tuple[Path, ...] = ()

    @classmethod
    def read(
        cls, names: Sequence[str], *, folder: Path | None = None, overrides: Mapping[str, str] | None = None
    ) -> "NeoxConfig":
        """Read and merge configuration files; see `files.read_settings`."""
        given = files.read_settings(names, folder, overrides or {})
        return cls(_replace_old_spellings(given), tuple(files.find_files(names, folder)))

    def get(self, name: str) -> Any:
        """Return a setting's value, or GPT-NeoX's default where it is not given, or is null."""
        default = keys.KEYS[name].default
        # Null says that the number is to be derived, although it has a default.
        if name == "gradient_accumulation_steps" and name in self.given:
            return self.given[name].value
        return default if name not in self.given or self.given[name].value is None else self.given[name].value

    def block(self, name: str) -> dict[str, Any]:
        """Return a block's settings with GPT-NeoX's defaults, `optimizer.params` for example."""
        outer, _, inner = name.partition(".")
        found = self.get(outer) or {}
        if inner:
            found = found.get(inner) or {}
        defaults = {each: key.default for each, key in keys.BLOCKS[name].items()}
        return defaults | {each: value for each, value in found.items() if value is not None}

    def where(self, name: str) -> str:
        """Return where a setting was given, with its value, for a message."""
        if name not in self.given:
            return f"{name} is not given, by default {keys.KEYS[name].default}"
        where, value = self.given[name].where, self.given[name].value
        return f"{where} {value}" if where.startswith("--") else f"{where}: {name} {value}"

    def need(self, *names: str) -> list[int]:
        """Return settings that have no default; UserError for one that is missing or below 1."""
        if missing := next((name for name in names if self.get(name) is None), None):
            listed = ", ".join(map(str, self.files)) or "no configuration file"
            raise UserError(f"{missing} is missing in {listed}: a model needs {', '.join(names)}")
        if small := next((name for name in names if self.get(name) < 1), None):
            raise UserError(f"{self.where(small)}: expected at least 1")
        return [self.get(name) for name in names]

    def check(self, among: Collection[str] = keys.KEYS) -> list[str]:
        """Return a line for all keys without effect, and one for each reason why others are followed differently.

        UserError for the first value that cannot be followed. Only keys `among` these, or in blocks of theirs, count.
        """
        ignored: list[str] = []
        different: dict[str, list[str]] = {}
        for name, value, key, where in self._values():
            if name.split(".")[0] not in among:
                continue
            outcome = keys.judge(key, value)
            if outcome == "refuse":
                raise UserError(f"{where}: {key.why}")
            if outcome == "ignore" and name in self.given:
                ignored.append(name)
            elif outcome == "differ":
                different.setdefault(key.why, []).append(where)
        lines = [f"{', '.join(places)}: {why}" for why, places in different.items()]
        if ignored:
            lines.insert(0, f"without effect here: {', '.join(ignored)} (docs/neox.md says why)")
        return lines

    def _values(self) -> list[tuple[str, Any, keys.Key, str]]:
        """Return name, value, key and place of each setting and of those within blocks; defaults come last."""
        found = [(name, self.get(name), key, self.where(name)) for name, key in keys.KEYS.items()]
        for name, known in keys.BLOCKS.items():
            outer, _, inner = name.partition(".")
            given = self.get(outer) or {}
            given = (given.get(inner) or {}) if inner else given
            place = self.given[outer].where if outer in self.given else outer
            for each, value in given.items():
                found.append((f"{name}.{each}", value, known[each], f"{place}: {name}.{each} {value}"))
        return sorted(found, key=lambda value: value[0].split(".")[0] not in self.given)

    @property
    def precision(self) -> str:
        """The trainer's name of the precision that `precision`, `fp16` and `bf16` say; UserError where they disagree.

        2021's `fp16: {type: bfloat16}` is bfloat16, whatever `enabled` says; today's GPT-NeoX takes it for float16.
        """
        said = {}
        if self.get("precision"):
            said["precision"] = PRECISIONS[self.get("precision")]
        half = self.get("fp16") or {}
        if half.get("type") == "bfloat16":
            said["fp16"] = "bfloat16"
        elif half.get("enabled"):
            said["fp16"] = "float16"
        if (self.get("bf16") or {}).get("enabled"):
            said["bf16"] = "bfloat16"
        if len(set(said.values())) > 1:
            first, second = list(said)[:2]
            raise UserError(
                f"{self.where(first)} says {said[first]}, {self.where(second)} says {said[second]}: make them agree"
            )
        return next(iter(said.values()), "float32")


def _replace_old_spellings(given: Mapping[str, GivenValue]) -> dict[str, GivenValue]:
    """Return settings in today's spelling: what 2021's configurations say otherwise."""
    found = dict(given)
    if (norm := found.get("norm")) and norm.value == "apexlayernorm":
        found["norm"] = GivenValue("layernorm", norm.where)
    return found
