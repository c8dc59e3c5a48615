import errno
import json
import os
import random
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.weights.files import read_arrays, write_safetensors

RNG = np.random.default_rng(0)
DTYPES = [
    *map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1")),
    np.dtype(bool),
    np.dtype(ml_dtypes.bfloat16),
]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].flags.c_contiguous
        assert found[name].tobytes() == array.tobytes(), name


def complaint(path):
    with pytest.raises(UserError) as error:
        read_arrays(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} ")
    assert "\n" not in sentence
    return sentence


# Reading


def test_every_dtype_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "model.safetensors"
    values = RNG.integers(0, 2, (3, 2)).astype(np.float32) * 1.5
    arrays = {dtype.name: values.astype(dtype) for dtype in DTYPES}
    write_safetensors(path, arrays, {"format": "pt", "note": "ünïcode"})
    found, metadata = read_arrays(path)
    assert_same(found, arrays)
    assert metadata == {"format": "pt", "note": "ünïcode"}


def test_torch_reads_what_is_written_and_we_read_what_it_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    values = torch.tensor([[0.0, 1.0], [-2.5, 4.0]])
    names = ["float32", "float16", "bfloat16", "bool"]
    tensors = {name: values.to(getattr(torch, name)) for name in names}
    save_file(tensors, path, {"format": "pt"})
    found, metadata = read_arrays(path)
    assert metadata == {"format": "pt"}
    for name in names[:-1]:
        assert found[name].dtype.name == name
        np.testing.assert_array_equal(found[name].astype(np.float32), values.numpy())
    again = tmp_path / "again.safetensors"
    write_safetensors(again, found)
    for name, tensor in load_file(again).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.float(), tensors[name].float())


def test_shapes_of_no_and_one_element(tmp_path):
    path = tmp_path / "model"
    arrays = {
        "scalar": np.array(3.0),
        "one": np.ones((1, 1)),
        "none": np.zeros((2, 0, 3), np.float32),
    }
    write_safetensors(path, arrays)
    found, metadata = read_arrays(path)
    assert_same(found, arrays)
    assert metadata == {}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_content_decides_not_the_name(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    content = {"a": torch.arange(6.0).view(2, 3)}
    misleading = tmp_path / "model.safetensors"
    torch.save(content, misleading, _use_new_zipfile_serialization=not legacy)
    found, metadata = read_arrays(misleading)
    np.testing.assert_array_equal(found["a"], content["a"].numpy())
    assert metadata == {}
    named_as_torchs = tmp_path / "model.pth"
    write_safetensors(named_as_torchs, {"a": np.ones(3)})
    assert_same(read_arrays(str(named_as_torchs))[0], {"a": np.ones(3)})


def write_by_hand(path, header, content):
    encoded = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)


def test_safetensors_by_hand(tmp_path):
    path = tmp_path / "model"
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    write_by_hand(path, {"a": entry}, b"\x80\x3f\x00\xc0")
    found, _ = read_arrays(path)
    assert_same(found, {"a": np.array([1, -2], ml_dtypes.bfloat16)})
    for change in (
        {"data_offsets": [0, 8]},
        {"data_offsets": [4, 0]},
        {"shape": [3]},
        {"shape": [-1]},
        {"dtype": "X"},
    ):
        write_by_hand(path, {"a": entry | change}, b"\x80\x3f\x00\xc0")
        assert "damaged or incomplete safetensors" in complaint(path)
    write_by_hand(path, {"a": entry | {"dtype": "C64", "shape": [1]}}, b"\0" * 4)
    complaint(path)
    nothing = {"data_offsets": [0, 0], "shape": [0, 2**62, 2**62]}
    write_by_hand(path, {"a": entry | nothing}, b"")
    complaint(path)
    write_by_hand(path, b"{" * 100_000, b"")
    assert "damaged or incomplete safetensors" in complaint(path)


def test_a_dtype_that_no_weights_have_is_named(tmp_path):
    path = tmp_path / "model"
    entry = {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}
    write_by_hand(path, {"a.b": entry}, b"\0" * 8)
    assert "holds a.b in the dtype C64" in complaint(path)


def small_file(path):
    arrays = {
        "first": RNG.normal(size=(2, 3)).astype(np.float32),
        "second": np.arange(4),
    }
    write_safetensors(path, arrays, {"key": "value"})
    return path.read_bytes(), arrays


def test_a_file_cut_anywhere_gives_a_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    content, arrays = small_file(path)
    assert_same(read_arrays(path)[0], arrays)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        complaint(path)
    path.write_bytes(content + b"x")
    complaint(path)


def test_flipped_bits_give_a_sentence_or_arrays(tmp_path):
    chance = random.Random(0)
    path = tmp_path / "model.safetensors"
    content, arrays = small_file(path)
    numbers = len(content) - sum(array.nbytes for array in arrays.values())
    shapes = {name: array.shape for name, array in arrays.items()}
    refused = 0
    for _ in range(1000):
        flipped = bytearray(content)
        place = chance.randrange(len(content))
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            found, _ = read_arrays(path)
        except UserError:
            refused += 1
            assert place < numbers
            continue
        total = sum(array.nbytes for array in found.values())
        assert total <= len(content) - numbers
        if place >= numbers:
            assert {name: array.shape for name, array in found.items()} == shapes
    assert 200 < refused < 950


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "is a Git LFS pointer",
        ),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "is a web page"),
        (b"\xef\xbb\xbf \n<html>", "is a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        (b"Entry not found", "it begins with b'Entry not found'"),
        (b'{"error": "Repository not found"}\n', 'it begins with b\'{"error"'),
        (b"", "is empty"),
        (b" \n", "is not a file of weights"),
        (b"\x89HDF\r\n\x1a\n\0\0", r"it begins with b'\x89HDF"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "is not a file of weights"),
        (b"\x02\0\0\0\0\0\0\0{}x", "damaged or incomplete safetensors"),
        (b"PK\x03\x04 and so on", "is damaged or cut short"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in complaint(path)


def test_what_cannot_be_opened(tmp_path):
    assert "No such file" in complaint(tmp_path / "nowhere.pth")
    assert "Is a directory" in complaint(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert "(Permission denied); give the path" in complaint(tmp_path)


# Writing


def test_arrays_that_are_not_contiguous(tmp_path):
    """safetensors.numpy writes memory as it is, which would mix these up."""
    path = tmp_path / "model.safetensors"
    kernel = RNG.normal(size=(3, 3, 4, 8)).astype(np.float32)
    swapped = kernel.astype(">f4")
    arrays = {
        "oihw": kernel.transpose(3, 2, 0, 1),
        "reversed": kernel[::-1, :, ::2],
        "fortran": np.asfortranarray(kernel),
        "repeated": np.broadcast_to(np.float32(2), (2, 3)),
        "swapped": swapped,
        "swapped_oihw": swapped.transpose(3, 2, 0, 1),
        "of_jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T,
    }
    write_safetensors(path, arrays)
    for found in (read_arrays(path)[0], safetensors.numpy.load_file(path)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
            assert found[name].shape == array.shape
    # What this guards against; should it no longer happen, _plain may do less.
    careless = safetensors.numpy.save({"oihw": arrays["oihw"]})
    mixed = safetensors.numpy.load(careless)["oihw"]
    assert not np.array_equal(mixed, arrays["oihw"])


def test_an_existing_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.zeros(3)})
    before = path.read_bytes()
    replaced = []
    replace = os.replace

    def watch(self, target):
        assert path.read_bytes() == before
        assert read_arrays(self)[0]["a"][0] == 1
        replaced.append(target)
        replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", watch)
    write_safetensors(path, {"a": np.ones(3)})
    assert replaced == [path]
    assert_same(read_arrays(path)[0], {"a": np.ones(3)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("I/O error"),
        KeyboardInterrupt(),
    ],
)
def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch, failure):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.zeros(3)})

    def fail(arrays, file, metadata):
        file.write_bytes(b"half of i")
        raise failure

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    is_interrupt = isinstance(failure, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if is_interrupt else UserError) as error:
        write_safetensors(path, {"a": np.ones(3)})
    if not is_interrupt:
        assert f"{path} cannot be written" in str(error.value)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_same(read_arrays(path)[0], {"a": np.zeros(3)})


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere; create it"):
        write_safetensors(tmp_path / "nowhere" / "a.safetensors", {"a": np.ones(3)})
    with pytest.raises(UserError, match=r"Is a directory"):
        write_safetensors(tmp_path, {"a": np.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [object, "U3", "complex128", ml_dtypes.int4, "u4"])
def test_a_dtype_that_cannot_be_written_is_named(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"head\.bias has the dtype .*, which is not"):
        write_safetensors(path, {"head.bias": np.zeros(2, dtype)})
    assert os.listdir(tmp_path) == []
