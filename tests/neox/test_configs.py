"""The configuration files in neox/configs: GPT-NeoX's values, and each of them a run of the trainer."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from neox_cases import SHIPPED

from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.models.registry import config_from_hf
from openchatkit.neox import model
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.translation import translate
from openchatkit.paths import ROOT
from openchatkit.training import config as trainer

CONFIGS = ROOT / "neox" / "configs"
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yml"))
OF_2021 = ("small", "medium", "XL", "local_setup", "sparse")
# Paths on machines of theirs, and a log of DeepSpeed's.
THEIRS = {"hostfile", "train_data_paths", "valid_data_paths", "test_data_paths", "vocab_file", "deepspeed_extra_args"}
MODELS = (
    "small small_bf16 medium large XL 125M 350M 760M 1-3B 2-7B 6-7B 13B 175B 19M 49M 800M 20B "
    "2021/13B 2021/175B 2021/2-7B 2021/6-7B local_setup text_generation sparse"
)
PYTHIA = "14M 31M 70M 160M 410M 1B 1-4B 2-8B 6-9B 12B"
# Layers, width, heads, peak rate: of the files that the golden values do not hold, from the papers.
OTHERS = {
    "small_bf16": (12, 768, 12, 6e-4),
    "large": (24, 1536, 16, 2.5e-4),
    "2021/6-7B": (32, 4096, 32, 1.2e-4),
    "760M": (24, 1536, 16, 2.5e-4),
    "1-3B": (24, 2048, 16, 2e-4),
    "13B": (40, 5120, 40, 1e-4),
    "20B": (44, 6144, 64, 0.97e-4),
    "pythia/70M": (6, 512, 8, 1e-3),
    "pythia/2-8B": (32, 2560, 32, 1.6e-4),
    "pythia/12B": (36, 5120, 40, 1.2e-4),
}


def golden(name: str) -> dict[str, object] | None:
    folder = "configs2021" if name in OF_2021 or name.startswith("2021/") else "configs"
    return SHIPPED.get(f"{folder}/{name.removeprefix('2021/')}.yml")


def test_every_promised_file_is_there():
    assert set(FILES) == {*MODELS.split(), *(f"pythia/{size}" for size in PYTHIA.split())}
    assert {name for name in FILES if golden(name) is None} == OTHERS.keys()


@pytest.mark.parametrize("name", FILES)
def test_values_are_gpt_neox_s(name):
    found = yaml.safe_load((CONFIGS / f"{name}.yml").read_text(encoding="utf-8"))
    if (expected := golden(name)) is not None:
        theirs = THEIRS - ({"vocab_file"} if name == "local_setup" else set())
        assert found == {key: value for key, value in expected.items() if key not in theirs}
    else:
        sizes = tuple(found[key] for key in ("num_layers", "hidden_size", "num_attention_heads"))
        assert (*sizes, found["optimizer"]["params"]["lr"]) == OTHERS[name]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("local_setup", "text_generation", "sparse")])
def test_each_is_a_run_of_the_trainer(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Path("data/enron")
    with TokenStoreWriter(place / "enron_text_document", vocab_size=256, masked=False) as writer:
        writer.add(np.full(2000, 97), np.full(1000, 2))
    names = [str(CONFIGS / name), str(CONFIGS / "local_setup")]
    overrides = {"tokenizer_type": "CharLevelTokenizer"}
    if name == "20B":  # it has paths of its own
        names, overrides = names[:1], overrides | {"data_path": f"{place}/enron_text_document"}
    config = NeoxConfig.read(names, overrides=overrides)
    ranks = max(config.get("pipe_parallel_size"), 1) * config.get("model_parallel_size")
    trainer.parse(translate(config, ranks=ranks, on_gpu=True).arguments)
    shape = config_from_hf(model.make_config(config, 50277))
    assert shape.vocab_size % (128 * config.get("model_parallel_size")) == 0


def test_sparse_layers_go_with_a_model():
    config = NeoxConfig.read([str(CONFIGS / name) for name in ("small", "sparse")])
    assert config_from_hf(model.make_config(config, 50277)).options.attention_config == ("local", "global") * 6


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published with the suite: without embedding and projection (arXiv 2304.01373, table 1).
    [
        ("pythia/70M", 18_915_328),
        ("pythia/160M", 85_056_000),
        ("pythia/1B", 805_736_448),
        ("pythia/12B", 11_327_027_200),
    ],
)
def test_pythia_has_its_published_number_of_parameters(name, parameters):
    from openchatkit.models.registry import family
    from openchatkit.models.shards import EMBED, shard_names

    config = NeoxConfig.read([str(CONFIGS / name)])
    shape = config_from_hf(model.make_config(config, 50277))
    kind, total = family(shape), 0
    for shard in shard_names(shape.num_layers):
        shapes = kind.parameter_shapes(shape, shard)
        total += sum(int(np.prod(size)) for key, size in shapes.items() if shard != EMBED and "embed_out" not in key)
    assert total == parameters
