"""What a project itself keeps out of its files: what `.gitignore` names, packages of others, virtual environments."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.formats.retrieval_index import Skipped

_NAME = ".gitignore"
_OF_OTHERS = {"__pycache__", "bower_components", "node_modules"}
_ADVICE = "see --include-ignored"


@dataclass(frozen=True)
class Rules:
    """The rules of a folder's `.gitignore`, and of those in the folders above it that its rules go before."""

    folder: Path
    spec: Any = None
    above: "Rules | None" = None

    def reason(self, entry: os.DirEntry[str]) -> str:
        """Why an entry of the folder is left out; empty where it is not."""
        if not entry.is_dir(follow_symlinks=False):
            return f"named by {_NAME} ({_ADVICE})" if self.name(Path(entry.path)) else ""
        if entry.name in _OF_OTHERS or os.path.lexists(os.path.join(entry.path, "pyvenv.cfg")):
            return f"made by a program or by others ({_ADVICE})"
        return f"named by {_NAME} ({_ADVICE})" if self.name(Path(entry.path), folder=True) else ""

    def name(self, path: Path, *, folder: bool = False) -> bool:
        """Whether the rules name a path under the folder."""
        if self.spec is not None:
            found = self.spec.check_file(path.relative_to(self.folder).as_posix() + "/" * folder).include
            if found is not None:
                return found
        return self.above is not None and self.above.name(path, folder=folder)


def rules_above(root: Path) -> Rules | None:
    """The rules that hold in a folder from above, up to that of its repository; None where they name the folder itself.

    Whoever names such a folder wants what is in it.
    """
    parents = list(root.parents)
    top = next((at for at, parent in enumerate([root, *parents]) if (parent / ".git").exists()), 0)
    rules = None
    for below, parent in zip([root, *parents][top - 1 :: -1] if top else [], parents[top - 1 :: -1], strict=False):
        rules = next((each for each in rules_in(parent, rules) if isinstance(each, Rules)), rules)
        if rules is not None and rules.name(below, folder=True):
            return None
    return rules


def rules_in(folder: Path, above: Rules | None) -> Iterator[Rules | Skipped]:
    """The rules of a folder; and what is to be told where its `.gitignore` cannot be heeded."""
    path = folder / _NAME
    spec = None
    if path.is_file():
        try:
            import pathspec

            spec = pathspec.GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
        except ImportError:
            yield Skipped(str(path), "not heeded, which needs a package: pip install pathspec")
        except (OSError, ValueError) as error:
            yield Skipped(str(path), f"not heeded: {error}")
    yield Rules(folder, spec, above)
