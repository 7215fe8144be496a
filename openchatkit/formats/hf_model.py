"""A Hugging Face model's folder, read one tensor at a time: safetensors or pickled, whole or in shards."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from openchatkit.download.sources import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats.layer_shards import CONFIG, read_config
from openchatkit.formats.manifest import DamagedError, advise
from openchatkit.formats.pickled import PickledFile
from openchatkit.formats.tensor_file import TensorFile, TensorSpec
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, PICKLED, PICKLED_INDEX)  # one of them is in every model's folder
GENERATION_CONFIG = "generation_config.json"

# What to fetch of a model on the hub; pickled weights only where there are no others.
SMALL_FILES = (CONFIG, *TOKENIZER_FILES)
SAFE_FILES = (WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors")
PICKLED_FILES = (PICKLED, PICKLED_INDEX, "pytorch_model-*-of-*.bin")
_AGAIN = "fetch or copy the model again"


class HFTensors:
    """The tensors of a model's folder, of any network: `path`, `files`, and `specs`, dtype and shape of each by key.

    `specs` is in the order of the files. Files stay open and are memory-mapped, except pickled ones from before
    torch 1.6, which take their whole size in memory: with `one_by_one` there are such, only one of them is held, and
    tensors should be read by one thread in the order of `specs`. UserError when there are no weights; DamagedError when
    a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.one_by_one = False
        self._open: dict[str, TensorFile | PickledFile] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, str] = {}
        with advise(_AGAIN):
            contents = _find_weights(self.path)
            self.files = sorted(contents)
            for name in self.files:
                found = self._file(name).specs
                listed = contents[name]
                for key in found if listed is None else listed:
                    if key not in found:
                        raise DamagedError(f"{self.path / name} lacks {key}, which the index promises")
                    self.specs[key], self._file_of[key] = found[key], name

    def read(self, key: str) -> Tensor:
        """Read one tensor, memory-mapped, on the CPU."""
        return self._file(self._file_of[key]).read([key])[key]

    def chunks(self, key: str) -> Iterator[memoryview]:
        """Yield one tensor's bytes in pieces; each is valid until the next is asked for."""
        return self._file(self._file_of[key]).chunks(key)

    def _file(self, name: str) -> TensorFile | PickledFile:
        if name not in self._open:
            if self.one_by_one:
                self._open.clear()
            path = self.path / name
            self._open[name] = file = PickledFile(path) if path.suffix == ".bin" else TensorFile(path)
            self.one_by_one |= not file.mapped
        return self._open[name]


class HFModel(HFTensors):
    """A model of a family that the kit knows: its tensors, and `raw_config` and `config`.

    UserError when it is not a model, or asks for remote code.
    """

    def __init__(self, path: Path) -> None:
        if not (Path(path) / CONFIG).is_file():
            raise UserError(f"{path} is not a model: {CONFIG} is missing; pass a hub name or a folder that holds it")
        self.raw_config, self.config = read_config(Path(path))
        super().__init__(path)


def _find_weights(path: Path) -> dict[str, list[str] | None]:
    """Return the files of the weights, each with the keys that an index gives it; safetensors win over pickled ones."""
    for whole, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLED, PICKLED_INDEX)):
        if (path / whole).is_file():
            return {whole: None}
        if (path / index).is_file():
            weight_map = read_json(path / index).get("weight_map")
            if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
                raise DamagedError(f"{path / index} has no weight_map of plain file names")
            return {file: [k for k, f in weight_map.items() if f == file] for file in set(weight_map.values())}
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
    raise UserError(f"{path} holds no weights: expected {WEIGHTS}, {PICKLED} or the index of either, found {found}")


def fetch(name: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a model on the hub or on disk; without `weights`, fetch only its config and tokenizer."""
    return fetch_model(str(name), SMALL_FILES, *((SAFE_FILES, PICKLED_FILES) if weights else ()))
