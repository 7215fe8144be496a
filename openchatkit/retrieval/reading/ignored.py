"""Files that a project itself excludes: those that `.gitignore` names, third-party packages, virtual environments."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.formats.retrieval_index import Skipped

_NAME = ".gitignore"
_OF_OTHERS = {"__pycache__", "bower_components", "node_modules"}
_ADVICE = "see --include-ignored"


@dataclass(frozen=True)
class Rules:
    """The rules of the `.gitignore` of a folder, which override those of the folders above it."""

    folder: Path
    spec: Any = None
    above: "Rules | None" = None

    def reason(self, entry: os.DirEntry[str]) -> str:
        """Return why an entry of the folder is skipped; empty if it is not."""
        if not entry.is_dir(follow_symlinks=False):
            return f"named by {_NAME} ({_ADVICE})" if self.match(Path(entry.path)) else ""
        if entry.name in _OF_OTHERS or os.path.lexists(os.path.join(entry.path, "pyvenv.cfg")):
            return f"made by a program or by others ({_ADVICE})"
        return f"named by {_NAME} ({_ADVICE})" if self.match(Path(entry.path), folder=True) else ""

    def match(self, path: Path, *, folder: bool = False) -> bool:
        """Whether the rules ignore a path under the folder."""
        if self.spec is not None:
            found = self.spec.check_file(path.relative_to(self.folder).as_posix() + "/" * folder).include
            if found is not None:
                return found
        return self.above is not None and self.above.match(path, folder=folder)


def rules_above(root: Path) -> Rules | None:
    """Return the rules that apply to a folder from above, up to its repository; None if they ignore the folder itself.

    A user who names an ignored folder wants its contents.
    """
    parents = list(root.parents)
    top = next((at for at, parent in enumerate([root, *parents]) if (parent / ".git").exists()), 0)
    rules = None
    for below, parent in zip([root, *parents][top - 1 :: -1] if top else [], parents[top - 1 :: -1], strict=False):
        rules = read_rules(parent, rules)[0]
        if rules.match(below, folder=True):
            return None
    return rules


def read_rules(folder: Path, above: Rules | None) -> tuple[Rules, list[Skipped]]:
    """Return the rules of a folder, and the reason if its `.gitignore` cannot be used."""
    path = folder / _NAME
    spec, problems = None, []
    if path.is_file():
        try:
            import pathspec

            spec = pathspec.GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
        except ImportError:
            problems = [Skipped(str(path), "not used, which needs a package: pip install pathspec")]
        except (OSError, ValueError) as error:
            problems = [Skipped(str(path), f"not used: {error}")]
    return Rules(folder, spec, above), problems
