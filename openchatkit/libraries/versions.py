"""Check of the installed libraries' versions against the ranges that the kit's metadata states."""

import functools
import importlib.metadata

from openchatkit.errors import UserError

# Those whose releases have broken the kit; each takes about a millisecond to look up.
_CHECKED = ("torch", "transformers", "huggingface_hub")


@functools.cache
def check_supported(distribution: str = "openchatkit") -> None:
    """Raise UserError where a library is missing or out of range: what was found, what is supported, what to run.

    Checks nothing where the kit runs from its folder and is not installed.
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
