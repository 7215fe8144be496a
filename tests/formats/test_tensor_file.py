"""Safetensors written and read in pieces, against the safetensors library; damage; what disks refuse."""

import errno
import hashlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openchatkit.errors import UserError
from openchatkit.formats import tensor_file
from openchatkit.formats.manifest import DamagedError
from openchatkit.formats.tensor_file import DTYPES, TensorFile, TensorSpec, cast, write_stream, write_tensors


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {"bytes": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        made[f"float {dtype}"] = torch.randn(7, 3, generator=generator).to(dtype)
    made["flags"] = torch.tensor([True, False, True])
    made["transposed"] = torch.randn(4, 6, generator=generator).T
    return made


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_the_library_reads_what_we_write(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, tensors, metadata={"note": "ü"})
    assert (record.name, record.size) == ("a.safetensors", path.stat().st_size)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert same(file.get_tensor(name), tensor), name


def test_we_read_what_the_library_writes(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK", 16)
    path = tmp_path / "b.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"k": "v"})
    file = TensorFile(path)
    assert file.metadata == {"k": "v"}
    assert set(file.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert file.specs[name] == TensorSpec(tensor.dtype, tuple(tensor.shape))
        pieces = [bytes(chunk) for chunk in file.chunks(name)]
        assert all(len(piece) <= 16 for piece in pieces)
        assert b"".join(pieces) == bytes(tensor_file.tensor_bytes(tensor))
        assert same(file.read([name])[name], tensor)


def test_every_dtype_of_torch_that_the_format_knows(tmp_path):
    tensors = {code: torch.zeros(2, 2).to(dtype) for code, dtype in DTYPES.items()}
    write_tensors(tmp_path / "c.safetensors", tensors)
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert {code: file.get_tensor(code).dtype for code in DTYPES} == DTYPES


def test_tensors_are_aligned(tmp_path):
    write_tensors(tmp_path / "d.safetensors", {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(3)})
    read = TensorFile(tmp_path / "d.safetensors").read(["wide"])["wide"]
    assert read.data_ptr() % 8 == 0


def test_a_read_tensor_can_be_written_to_without_touching_the_file(tmp_path):
    path = tmp_path / "e.safetensors"
    write_tensors(path, {"w": torch.ones(4)})
    before = path.read_bytes()
    TensorFile(path).read(["w"])["w"].add_(1)
    assert path.read_bytes() == before


def test_cut_at_any_length_is_damaged(tmp_path, tensors):
    path = tmp_path / "f.safetensors"
    write_tensors(path, tensors)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"f\.safetensors is not a whole safetensors file"):
            TensorFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedError, match=f"{len(whole):,} bytes expected, {len(whole) + 1:,} found"):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_does_not_fit_its_bytes_is_damaged(tmp_path, header):
    (tmp_path / "g").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "g")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DamagedError, match="nowhere is missing"):
        TensorFile(tmp_path / "nowhere")


def test_a_file_cut_while_it_is_read(tmp_path):
    path = tmp_path / "h.safetensors"
    write_tensors(path, {"w": torch.ones(100)})
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedError, match="was cut while it was read"):
        list(file.chunks("w"))


def test_cast_is_torch_s_and_refuses_to_overflow():
    values = torch.tensor([1.0, float("inf"), float("nan"), -65504.0])
    (chunk,) = (bytes(c) for c in cast([tensor_file.tensor_bytes(values)], torch.float32, torch.float16))
    assert chunk == bytes(tensor_file.tensor_bytes(values.half()))
    large = tensor_file.tensor_bytes(torch.tensor([1.0, 70000.0]))
    with pytest.raises(OverflowError, match="values up to 70000"):
        list(cast([large], torch.float32, torch.float16))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full: make room"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "the disk reports an error"),
    ],
)
def test_what_a_disk_refuses_is_one_line_and_leaves_nothing(tmp_path, code, reason):
    def refuse(name):
        raise OSError(code, "refused")

    path = tmp_path / "i.safetensors"
    with pytest.raises(UserError, match=rf"cannot write {re.escape(str(path))}: {reason}.* run the same command again"):
        write_stream(path, {"w": TensorSpec(torch.float32, (1,))}, refuse)
    assert not list(tmp_path.iterdir())


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="part of the path is a file"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"w": torch.ones(1)})


def test_the_file_size_limit_of_the_shell(tmp_path):
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from openchatkit.formats.tensor_file import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_tensors(Path(sys.argv[1]), {'w': torch.ones(1000)})\n"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "j"], capture_output=True, text=True, check=False)
    assert "UserError: cannot write" in run.stderr
    assert "see `ulimit -f`" in run.stderr
    assert not list(tmp_path.iterdir())
