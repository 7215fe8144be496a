"""The table of GPT-NeoX's settings: complete, without contradictions, and true of the shipped configurations."""

import collections

import pytest
from neox_cases import REFUSED, SHIPPED

from openchatkit.errors import UserError
from openchatkit.formats import neox_settings
from openchatkit.neox import key_page, key_tables, keys
from openchatkit.neox.config import NeoxConfig

TABLES = [
    table for name, table in vars(key_tables).items() if isinstance(table, dict) and name.isupper() and name != "BLOCKS"
]


def test_every_shipped_key_has_an_outcome():
    shipped = {name for settings in SHIPPED.values() for name in settings}
    assert shipped - keys.KEYS.keys() - keys.ALIASES.keys() == {"attention_type"}
    for outer, inner in keys.BLOCKS.items():
        if "." not in outer:
            found = {name for settings in SHIPPED.values() for name in settings.get(outer) or {}}
            assert found <= inner.keys(), outer


def test_a_key_is_in_one_table():
    counts = collections.Counter(name for table in TABLES for name in table)
    assert [name for name, count in counts.items() if count > 1] == []
    assert counts.keys() == keys.KEYS.keys()
    assert not keys.ALIASES.keys() & keys.KEYS.keys()
    assert set(keys.ALIASES.values()) <= keys.KEYS.keys()


def test_defaults_are_values_of_their_key_and_reasons_are_given():
    for table in (keys.KEYS, *keys.BLOCKS.values()):
        for name, key in table.items():
            assert keys.read_value(name, key, key.default, "here") == key.default
            assert key.why or key.only is None, name
            assert key.outcome not in ("ignore", "refuse") or keys.judge(key, None) != "refuse", name


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_followed_or_refused_by_name(name, write):
    settings = SHIPPED[name]
    if "num_layers" not in settings:  # a file of paths or of text generation goes with that of a model
        settings = SHIPPED["configs/125M.yml"] | settings
    path = write("shipped.json", settings)
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"{path}:\d+: .*\b{REFUSED[name]}\b"):
            check(NeoxConfig.read([str(path)]))
    else:
        check(NeoxConfig.read([str(path)]))


def check(config: NeoxConfig) -> None:
    neox_settings.choose_attention(config, config.get("num_layers"))
    config.check()
    neox_settings.describe_model(config, rows=512)


def test_the_page_of_keys_is_up_to_date():
    text = key_page.PAGE.read_text(encoding="utf-8")
    assert key_page.make_page(text) == text
    assert all(f"`{name}`" in text for name in keys.KEYS)
