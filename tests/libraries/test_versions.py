"""A library that is missing or out of range is reported in one line, before anything else fails because of it."""

import importlib.metadata

import pytest

from openchatkit.errors import UserError
from openchatkit.libraries import versions


@pytest.fixture
def installed(monkeypatch):
    """Say which versions there are: `installed(torch="2.12.0")`; what is not named is missing."""

    def say(**found):
        def version(name):
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        stated = [
            "torch<3,>=2.11",
            "transformers<6,>=5.17",
            "huggingface_hub<3,>=1.30",
            "numpy>=2.1",
            'torch==1.0; extra == "old"',
        ]
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: stated)
        monkeypatch.setattr(importlib.metadata, "version", version)

    versions.check_supported.cache_clear()
    yield say
    versions.check_supported.cache_clear()


WITHIN = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "huggingface_hub": "2.4.0"}


def test_versions_within_their_ranges_say_nothing(installed):
    installed(**WITHIN)
    assert versions.check_supported() is None
    versions.check_supported.cache_clear()
    installed(**{**WITHIN, "torch": "2.16.0a0+git1234"})
    assert versions.check_supported() is None


@pytest.mark.parametrize("found", ["5.16.3", "6.0.0"])
def test_a_version_outside_of_its_range(installed, found):
    installed(**{**WITHIN, "transformers": found})
    with pytest.raises(UserError) as raised:
        versions.check_supported()
    assert str(raised.value) == (
        f"transformers {found} is installed, the kit is for transformers <6,>=5.17: run pip install "
        "'transformers<6,>=5.17', or pip install -c constraints.txt -e . in the kit's folder"
    )


def test_a_library_that_is_missing(installed):
    installed(torch="2.13.0", transformers="5.24.0")
    with pytest.raises(UserError, match=r"^huggingface_hub is not installed, the kit is for .* <3,>=1\.30: run"):
        versions.check_supported()


def test_a_kit_that_is_not_installed_says_nothing(monkeypatch):
    versions.check_supported.cache_clear()
    assert versions.check_supported("openchatkit-of-nobody") is None
