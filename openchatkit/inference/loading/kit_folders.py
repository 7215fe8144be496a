"""Models that are in no Hugging Face folder, for a chat: training checkpoints, layer shards, GPT-NeoX's own files.

Nothing is converted on the disk: transformers is given a folder of the small files, and the tensors by its names, which
stay memory-mapped.
"""

from pathlib import Path

from torch import Tensor

from openchatkit.formats import hf_writer, tokenizer_files
from openchatkit.loading import stages
from openchatkit.loading.model_kinds import ModelFolder
from openchatkit.loading.stages import ShardReader
from openchatkit.models.registry import family


def write_description(reader: ShardReader, folder: Path) -> None:
    """Write config.json and generation_config.json as a conversion would; the tokenizer is in the folder already."""
    dtype = max(reader.read(reader.shards[1]).values(), key=Tensor.numel).dtype
    hf_writer.write_config(folder, reader.raw_config, reader.config, dtype=dtype, tokenizer=folder)


def write_tokenizer(found: ModelFolder, folder: Path, *, other: Path | None) -> None:
    """Write the model's tokenizer, or that in the folder `other`, as a conversion would; UserError without one."""
    if other is None:
        stages.write_tokenizer(found, folder)
    else:
        tokenizer_files.copy_tokenizer(other, folder)
    tokenizer_files.add_chat_template(folder)


def read_tensors(reader: ShardReader) -> dict[str, Tensor]:
    """Return all tensors by their Hugging Face keys, on the CPU, as they are stored."""
    key = family(reader.config).hf_key
    return {key(shard, name): tensor for shard in reader.shards for name, tensor in reader.read(shard).items()}
