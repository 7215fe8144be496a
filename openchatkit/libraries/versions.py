"""Whether the libraries that are installed are within the ranges that the kit is for, as its metadata states them."""

import functools
import importlib.metadata

from openchatkit.errors import UserError

# Those whose releases have broken the kit; each takes about a millisecond to look up.
_CHECKED = ("torch", "transformers", "huggingface_hub")


@functools.cache
def check_supported(distribution: str = "openchatkit") -> None:
    """UserError where a library is missing or outside of its range: what was found, what is supported, what to run.

    Says nothing where the kit itself is not installed, and runs from its folder.
    """
    from packaging.requirements import Requirement

    try:
        stated = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, stated):
        if requirement.name not in _CHECKED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {found} is installed" if found else f"{requirement.name} is not installed"
            raise UserError(
                f"{what}, the kit is for {requirement.name} {requirement.specifier}: run pip install "
                f"'{requirement.name}{requirement.specifier}', or pip install -c constraints.txt -e . "
                "in the kit's folder"
            )
