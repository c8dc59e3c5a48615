"""Files of torch.save: torch's own, and ones written here by hand, opcode by opcode."""

import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.weights.torch_files import read_torch_file

MAGIC = 0x1950A86A20F9469CFC6C


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch writes these files")


@pytest.fixture(params=["zip", "legacy"])
def save(request, torch, tmp_path):
    """Saves an object with torch.save in one of its formats, and gives the path."""
    path = tmp_path / "model.pth"

    def write(content, **options):
        as_zip = request.param == "zip"
        torch.save(content, path, _use_new_zipfile_serialization=as_zip, **options)
        return path

    return write


def assert_same(found, expected):
    """The same names in the same order, and arrays equal to the tensors' bits."""
    torch = pytest.importorskip("torch")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert str(tensor.dtype) == f"torch.{found[name].dtype.name}", name
        assert found[name].flags.c_contiguous
        assert found[name].flags.owndata
        fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
        values = fresh.view(-1).view(torch.uint8).numpy()
        assert found[name].tobytes() == values.tobytes(), name


def complaint(path):
    with pytest.raises(UserError) as error:
        read_torch_file(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} ")
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


# Files of torch.save


def test_a_state_dict(torch, save):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 5)
    )
    for parameter in net.buffers():
        parameter.data.add_(3)
    found = read_torch_file(save(net.state_dict()))
    assert_same(found, net.state_dict())
    assert found["1.num_batches_tracked"].shape == ()
    assert found["1.num_batches_tracked"] == 3


def test_every_dtype(torch, save):
    names = ["float32", "float16", "float64", "bfloat16", "bool"]
    names += ["int64", "int32", "int16", "int8", "uint8"]
    values = torch.tensor([[0.0, 1.0, 2.0], [4.0, 8.0, 64.0]])
    content = {name: values.to(getattr(torch, name)) for name in names}
    found = read_torch_file(save(content))
    assert_same(found, content)
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["bfloat16"].astype(np.float32), values.numpy())


def test_views_of_storages(torch, save):
    base = torch.arange(120.0).reshape(2, 3, 4, 5)
    content = {
        "whole": base,
        "same": base,
        "transposed": base.permute(3, 2, 0, 1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "middle": base[1, 1:, ::2, 1:4],
        "column": base[..., 4],
        "element": base[1, 2, 3, 4],
        "expanded": torch.tensor([7.0]).expand(4, 3),
        "empty": torch.zeros(0),
        "empty_view": base[:, :, 4:],
        "empty_large": torch.zeros(3, 0, 1000),
        "one_by_one": base[1:, 2:3, :1, 4:],
        "half": torch.arange(6).half().view(2, 3).t(),
    }
    assert_same(read_torch_file(save(content)), content)


def test_arrays_of_shared_storages_are_apart(torch, save):
    base = torch.zeros(4)
    found = read_torch_file(save({"first": base, "second": base}))
    found["first"][0] = 1
    assert found["second"][0] == 0


def test_parameters(torch, save):
    content = {"weight": torch.nn.Parameter(torch.arange(6.0).view(2, 3))}
    assert_same(read_torch_file(save(content)), content)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(torch, save, protocol):
    content = {"a": torch.arange(6.0), "b": {"c": ["list", "of"], "d": b"bytes"}}
    found = read_torch_file(save(content, pickle_protocol=protocol))
    assert_same(found, {"a": content["a"]})


def test_random_views(torch, save):
    chance = random.Random(0)
    content = {}
    for index in range(150):
        tensor = torch.randn(
            [chance.randint(0, 6) for _ in range(chance.randint(0, 5))]
        )
        axes = list(range(tensor.ndim))
        tensor = tensor.permute(chance.sample(axes, tensor.ndim))
        for axis in axes:
            size = tensor.shape[axis]
            first = chance.randint(0, size)
            tensor = tensor.narrow(axis, first, chance.randint(0, size - first))
        content[f"layer{index}.weight"] = tensor[::2] if tensor.ndim else tensor
    assert_same(read_torch_file(save(content)), content)


def test_a_file_written_to_a_stream(torch, tmp_path):
    content = {"a": torch.arange(5.0)}
    stream = io.BytesIO()
    torch.save(content, stream)
    path = tmp_path / "from_stream.bin"
    path.write_bytes(stream.getvalue())
    assert_same(read_torch_file(str(path)), content)


# Checkpoints


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_a_nested_state_dict_is_found(torch, save, key):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "arch": "resnet50",
        "best": 76.1,
        "optimizer": optimizer.state_dict(),
        "rng_state": torch.get_rng_state(),
        "schedule": {"milestones": [1, 2], "last": (1, None, True)},
        "model_ema": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)},
        key: net.state_dict(),
    }
    assert_same(read_torch_file(save(checkpoint)), net.state_dict())


def test_what_training_scripts_save_beside_it_is_ignored(torch, save):
    import argparse
    import collections

    checkpoint = {
        "args": argparse.Namespace(lr=0.1, tags={"a", "b"}, data=b"\x00\xff"),
        "best": np.float64(76.1),
        "array": np.arange(3),
        "milestones": collections.Counter([30, 60]),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "complex": 1 + 2j,
        "state_dict": {"a": torch.ones(2), "epoch": 7, "note": "text"},
    }
    found = read_torch_file(save(checkpoint))
    assert_same(found, {"a": torch.ones(2)})


def test_averaged_weights_are_taken_only_where_they_are_alone(torch, save):
    plain, averaged = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    both = {"state_dict_ema": averaged, "semantic": plain}
    assert_same(read_torch_file(save(both)), plain)
    alone = {"state_dict_ema": averaged, "epoch": 1}
    assert_same(read_torch_file(save(alone)), averaged)
    path = save({"generator": plain, "critic": averaged})
    assert "several state dicts (generator, critic)" in complaint(path)
    path = save(dict.fromkeys(range(9), plain))
    assert "several state dicts (0, 1, 2, 3, ...)" in complaint(path)


def test_the_wrapper_of_a_wrapper_is_taken_off(torch, save):
    inner = {"module.a": torch.zeros(2), "head": torch.ones(2)}
    path = save({"model": {"state_dict": inner}})
    assert_same(read_torch_file(path), inner)


def test_a_file_without_a_state_dict(torch, save):
    for content in (
        {},
        [torch.zeros(2)],
        torch.zeros(2),
        3,
        {"epoch": 1},
        {"state_dict": {}},
        {0: torch.zeros(2)},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    ):
        assert "holds no state dict" in complaint(save(content))


def test_a_dict_in_itself(torch, save):
    content = {"epoch": 1}
    content["model"] = content
    assert "holds no state dict" in complaint(save(content))
    content["weight"] = torch.ones(2)
    assert_same(read_torch_file(save(content)), {"weight": torch.ones(2)})


def test_tensors_that_are_not_dense_and_real_are_refused(torch, save):
    for word, tensor in (
        ("_rebuild_sparse_tensor", torch.eye(3).to_sparse()),
        ("ComplexFloatStorage", torch.ones(2, dtype=torch.complex64)),
        ("_rebuild_meta_tensor", torch.ones(2, device="meta")),
        ("_rebuild_tensor_v3", torch.ones(2).to(torch.float8_e4m3fn)),
        ("negated", torch.ones(2, dtype=torch.complex64).conj().imag),
    ):
        sentence = complaint(save({"good": torch.ones(2), "head.weight": tensor}))
        assert word in sentence or "UntypedStorage" in sentence


def test_a_whole_model_says_what_to_save(torch, save):
    sentence = complaint(save(torch.nn.Linear(2, 2)))
    assert "asks for torch.nn.modules.linear.Linear" in sentence
    assert "model.state_dict()" in sentence


@pytest.mark.parametrize("sign", ["constants.pkl", "code/__torch__.py"])
def test_a_torchscript_archive(tmp_path, sign):
    path = write_zip(tmp_path, b"}", **{sign: b""})
    assert "TorchScript" in complaint(path)


# Files written by hand


def int_(value):
    """The opcodes of an integer of any size."""
    return pickle.dumps(value, 2)[2:-1]


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def global_of(module, name):
    return f"c{module}\n{name}\n".encode()


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def dict_of(**items):
    pairs = b"".join(text(name) + value for name, value in items.items())
    return b"}(" + pairs + b"u"


def call(module, name, *arguments):
    return global_of(module, name) + tuple_of(*arguments) + b"R"


def storage_of(kind, key, size, *more):
    parts = (text("storage"), global_of("torch", kind), text(key), text("cpu"))
    return tuple_of(*parts, int_(size), *more) + b"Q"


def tensor_of(storage, offset, shape, stride, *more, function="_rebuild_tensor_v2"):
    parts = (
        storage,
        int_(offset),
        tuple_of(*map(int_, shape)),
        tuple_of(*map(int_, stride)),
    )
    return call("torch._utils", function, *parts, *more)


def write_zip(folder, program, storages=(), **members):
    """A zip archive as torch.save's, of opcodes and the bytes of its storages."""
    path = folder / "by_hand.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        for key, content in dict(storages).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


def write_legacy(folder, program, storages=(), keys=None):
    """A file as torch < 1.6's, of opcodes and (size, bytes) of its storages."""
    path = folder / "by_hand.pth"
    parts = [MAGIC, 1001, {"little_endian": True}]
    content = b"".join(pickle.dumps(part, 2) for part in parts)
    content += b"\x80\x02" + program + b"."
    content += pickle.dumps(list(dict(storages)) if keys is None else keys, 2)
    for count, raw in dict(storages).values():
        content += struct.pack("<q", count) + raw
    path.write_bytes(content)
    return path


NUMBERS = np.arange(6, dtype="<f4")
STORAGE = storage_of("FloatStorage", "0", 6)


def read_by_hand(folder, program):
    """What a program over NUMBERS gives, the same in both formats."""
    raw = NUMBERS.tobytes()
    found = read_torch_file(write_zip(folder, program, {"0": raw}))
    again = read_torch_file(write_legacy(folder, program, {"0": (6, raw)}))
    assert found.keys() == again.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], again[name])
    return found


def complaint_by_hand(folder, program):
    raw = NUMBERS.tobytes()
    zipped = complaint(write_zip(folder, program, {"0": raw}))
    legacy = complaint(write_legacy(folder, program, {"0": (6, raw)}))
    assert legacy.split()[:4] == zipped.split()[:4]
    return zipped


def test_a_tensor_by_hand(tmp_path):
    program = dict_of(a=tensor_of(STORAGE, 1, [2, 2], [1, 3]))
    found = read_by_hand(tmp_path, program)
    np.testing.assert_array_equal(found["a"], [[1, 4], [2, 5]])
    # The stride of a single element is of no importance.
    program = dict_of(a=tensor_of(STORAGE, 2, [1, 2], [2**62, 3]))
    np.testing.assert_array_equal(read_by_hand(tmp_path, program)["a"], [[2, 5]])


def test_files_of_python_2_and_the_first_versions_of_torch(tmp_path):
    """As torchvision's oldest: byte strings, pairs in lists, an older function."""
    name = b"U\x09\xc3\xa4.weight"
    storage = tuple_of(
        b"U\x07storage",
        global_of("torch.cuda", "FloatStorage"),
        b"U\x010",
        b"U\x04cuda",
    )[:-1] + (b"\x8a\x01\x06" + b"N" + b"tQ")
    tensor = tensor_of(storage, 0, [6], [1], function="_rebuild_tensor")
    pairs = b"](](" + name + tensor + b"ee"
    program = global_of("collections", "OrderedDict") + tuple_of(pairs) + b"R"
    raw = NUMBERS.tobytes()
    found = read_torch_file(write_legacy(tmp_path, program, {"0": (6, raw)}))
    assert list(found) == ["ä.weight"]
    np.testing.assert_array_equal(found["ä.weight"], NUMBERS)


def test_a_part_of_a_legacy_storage_is_refused(tmp_path):
    part = tuple_of(text("view"), int_(2), int_(3))
    storage = storage_of("FloatStorage", "0", 6, part)
    program = dict_of(a=tensor_of(storage, 1, [2], [1]))
    path = write_legacy(tmp_path, program, {"0": (6, NUMBERS.tobytes())})
    assert "not a whole storage" in complaint(path)


def test_a_big_endian_file_is_refused(tmp_path):
    program = dict_of(a=tensor_of(STORAGE, 0, [6], [1]))
    raw = {"0": NUMBERS.tobytes()}
    path = write_zip(tmp_path, program, raw, byteorder="little")
    np.testing.assert_array_equal(read_torch_file(path)["a"], NUMBERS)
    path = write_zip(tmp_path, program, raw, byteorder="big")
    assert "big-endian" in complaint(path)
    content = write_legacy(tmp_path, program, {"0": (6, raw["0"])}).read_bytes()
    path.write_bytes(
        content.replace(b"little_endianq\x01\x88", b"little_endianq\x01\x89")
    )
    assert "big-endian" in complaint(path)


# Files that would do harm


class Harm:
    """Unpickled, it creates a file."""

    def __init__(self, path, function=open):
        self.path, self.function = path, function

    def __reduce__(self):
        if self.function is open:
            return open, (str(self.path), "w")
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("function", [open, os.system])
@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_file_is_run(tmp_path, protocol, function):
    trace = tmp_path / "trace"
    harm = pickle.dumps({"state_dict": Harm(trace, function)}, protocol)
    # The pickle does what it is made for.
    pickle.loads(harm)
    assert trace.exists()
    trace.unlink()
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", harm)
    sentences = [complaint(path)]
    healthy = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
    for place in range(5):
        if place or protocol >= 2:
            path.write_bytes(b"".join((*healthy, b"\x80\x02}.")[:place]) + harm)
            sentences.append(complaint(path))
    assert not trace.exists()
    if protocol >= 2:
        name = ".open" if function is open else "posix.system"
        for sentence in sentences:
            assert name in sentence
            assert "refused, nothing was run" in sentence


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch", "FloatStorage.__init__"),
        ("torch.hub", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy.testing._private.utils", "runstring"),
        ("resnet_jax.weights.torch_files", "read_torch_file"),
    ],
)
def test_every_other_name_is_refused_by_name(tmp_path, module, name):
    attack = call(module, name, text("x"))
    sentence = complaint_by_hand(tmp_path, dict_of(a=attack))
    assert f"asks for {module}.{name}, which" in sentence
    stacked = text(module) + text(name) + b"\x93" + tuple_of(text("x")) + b"R"
    assert f"asks for {module}.{name}, which" in complaint_by_hand(tmp_path, stacked)


def test_a_name_that_would_upset_the_terminal_is_escaped(tmp_path):
    attack = text("evil\x1b[2J\n") + text("x" * 9000) + b"\x93"
    sentence = complaint_by_hand(tmp_path, attack)
    assert r"evil\x1b[2J\n.xxx" in sentence


GOOD = tensor_of(STORAGE, 0, [6], [1])
SIZE = global_of("torch", "Size")
ORDERED_DICT = global_of("collections", "OrderedDict")
DEEP = 100_000


@pytest.mark.parametrize(
    "program",
    [
        # Views beyond the storage, or of odd numbers.
        dict_of(a=tensor_of(STORAGE, 1, [6], [1])),
        dict_of(a=tensor_of(STORAGE, 0, [7], [1])),
        dict_of(a=tensor_of(STORAGE, 0, [2, 4], [3, 1])),
        dict_of(a=tensor_of(STORAGE, 6, [], [])),
        dict_of(a=tensor_of(STORAGE, -1, [2], [1])),
        dict_of(a=tensor_of(STORAGE, 5, [2], [-1])),
        dict_of(a=tensor_of(STORAGE, 0, [-2], [1])),
        dict_of(a=tensor_of(STORAGE, 0, [2, 2], [1])),
        dict_of(a=tensor_of(STORAGE, 0, [1] * 40, [1] * 40)),
        dict_of(a=tensor_of(STORAGE, 0, [2**62, 2**62], [2**62, 1])),
        dict_of(a=tensor_of(STORAGE, 0, [2], [2**80])),
        dict_of(a=tensor_of(STORAGE, 0, [0, 2**62, 2**62], [1, 1, 1])),
        dict_of(a=tensor_of(storage_of("FloatStorage", "0", -6), 0, [1], [1])),
        dict_of(a=tensor_of(text("no storage"), 0, [1], [1])),
        dict_of(a=tensor_of(STORAGE, 0, [6], [1], function="_rebuild_tensor_v3")),
        dict_of(a=call("torch._utils", "_rebuild_tensor_v2")),
        dict_of(a=call("torch._utils", "_rebuild_tensor_v2", STORAGE)),
        dict_of(a=call("torch._utils", "_rebuild_parameter")),
        dict_of(a=call("torch._utils", "_rebuild_parameter", text("x"))),
        # The same storage as two, and one that is not in the file.
        dict_of(a=GOOD, b=tensor_of(storage_of("LongStorage", "0", 6), 0, [6], [1])),
        dict_of(a=GOOD, b=tensor_of(storage_of("FloatStorage", "0", 5), 0, [5], [1])),
        dict_of(a=tensor_of(storage_of("FloatStorage", "1", 6), 0, [6], [1])),
        dict_of(a=tensor_of(storage_of("FloatStorage", "0", 5), 0, [5], [1])),
        dict_of(a=tensor_of(storage_of("FloatStorage", "0", 7), 0, [5], [1])),
        dict_of(a=tensor_of(storage_of("FloatStorage", "0", 2**61), 0, [5], [1])),
        # References that are no storages.
        dict_of(a=text("storage") + b"Q"),
        dict_of(a=tuple_of(text("module"), text("x"), text("y"), text("z")) + b"Q"),
        dict_of(a=tuple_of(text("storage"), SIZE, text("0"), b"N", int_(1)) + b"Q"),
        dict_of(a=tuple_of(text("storage"), SIZE, b"]", b"N", int_(1)) + b"Q"),
        # Calls with odd arguments, and of what is no function.
        dict_of(a=SIZE + tuple_of(text("x")) + b"R"),
        dict_of(a=SIZE + text("x") + b"R"),
        dict_of(a=SIZE + b"N" + b"\x81"),
        dict_of(a=text("x") + b")R"),
        dict_of(a=GOOD + b")R"),
        dict_of(a=b"})\x81"),
        dict_of(a=global_of("torch", "float32") + b")R"),
        dict_of(a=global_of("torch", "FloatStorage") + b")R"),
        dict_of(a=ORDERED_DICT + tuple_of(text("ab")) + b"R"),
        dict_of(a=ORDERED_DICT + tuple_of(b"](" + text("ab") + b"e") + b"R"),
        dict_of(a=ORDERED_DICT + tuple_of(b"](](}e" + b"e") + b"R"),
        dict_of(a=ORDERED_DICT + tuple_of(b"]" + int_(3) + b"a") + b"R"),
        # Attributes of what has none, as our own functions and classes.
        dict_of(a=SIZE + dict_of(__call__=SIZE) + b"b"),
        dict_of(a=SIZE + tuple_of(b"N", dict_of(name=text("x"))) + b"b"),
        dict_of(a=GOOD + dict_of(storage=b"N") + b"b"),
        dict_of(a=b"]" + dict_of(append=b"N") + b"b"),
        # Names that are none.
        b"]]\x93",
        text("torch") + int_(3) + b"\x93",
        text("torch") + b"]\x93",
        rb"ctorch\q" + b"\nx\n",
        b"c\xff\xfe\nx\n",
        b"cno end of line",
        # A stack that is empty, marks that are missing, what is no container.
        b"",
        b"0",
        b"u",
        b"t",
        b"}}s",
        b"}(" + text("odd") + b"u",
        b"](" + text("no end"),
        text("x") + b"]a",
        text("x") + b"(" + text("a") + text("b") + b"u",
        b"h\x07",
        # Opcodes of no use here: calls, imports and references as text, buffers.
        b"(S'x'\nios\nsystem\n",
        b"(cos\nsystem\nS'x'\no",
        b"P0\n",
        b"\x82\x01",
        b"\x97",
        b"\xfe",
        # Numbers of bytes that are not there.
        b"\x8e" + struct.pack("<Q", 2**62),
        b"\x96" + struct.pack("<Q", 2**62),
        b"B" + struct.pack("<I", 2**32 - 1),
        b"\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x8b" + struct.pack("<i", -5),
        # Bytes of no text, as a key that cannot be one, and very large numbers.
        b"X\x02\0\0\0\xff\xfe",
        b"}]" + int_(1) + b"s",
        b"}})" + int_(1) + b"us",
        dict_of(a=tensor_of(STORAGE, 10**5000, [6], [1])),
        b"I" + b"9" * 100_000 + b"\n",
        # Nested so deeply that a hash or a traversal would overflow the C stack.
        b"})" + b"\x85" * DEEP + int_(1) + b"s",
        b"]" * DEEP + b"a" * (DEEP - 1),
        b")" + b"\x85" * DEEP,
        dict_of(a=b")" + b"\x85" * DEEP),
    ],
)
def test_a_pickle_that_makes_no_sense_gives_a_sentence(tmp_path, program):
    complaint(write_zip(tmp_path, program, {"0": NUMBERS.tobytes()}))
    complaint(write_legacy(tmp_path, program, {"0": (6, NUMBERS.tobytes())}))


def test_a_memo_of_a_huge_index_takes_no_memory(tmp_path):
    """Python's unpickler would set aside room for all indices up to it."""
    put = b"r" + struct.pack("<I", 2**32 - 1)
    get = b"j" + struct.pack("<I", 2**32 - 1)
    found = read_by_hand(tmp_path, dict_of(a=GOOD + put, b=get))
    np.testing.assert_array_equal(found["b"], NUMBERS)


def test_repetition_is_bounded(tmp_path):
    """A few bytes that would describe terabytes."""
    repeated = dict_of(a=tensor_of(STORAGE, 0, [10**6, 10**6], [0, 0]))
    assert "refused" in complaint_by_hand(tmp_path, repeated)
    expanded = dict_of(a=tensor_of(STORAGE, 2, [1000, 2], [0, 1]))
    found = read_by_hand(tmp_path, expanded)
    np.testing.assert_array_equal(found["a"], np.tile([[2, 3]], (1000, 1)))
    pairs = b"](" + b"".join(tuple_of(int_(i), b"N") for i in range(3000)) + b"e"
    again = b"h\x01h\x02\x85R"
    many = ORDERED_DICT + b"q\x01" + pairs + b"q\x02" + again * 3000
    sentence = complaint(write_zip(tmp_path, many + b"\x85"))
    assert "entries in its dicts" in sentence
    many = call("builtins", "set", *map(int_, range(9)))
    assert "many arguments" in complaint(write_zip(tmp_path, dict_of(a=many)))


def test_storages_of_odd_sizes_are_refused(tmp_path):
    program = dict_of(a=GOOD)
    raw = NUMBERS.tobytes()
    for content in (raw[:-1], raw + b"x", b""):
        path = write_zip(tmp_path, program, {"0": content})
        assert f"has {len(content)} bytes instead of 24" in complaint(path)
    assert "no item named 'archive/data/0'" in complaint(write_zip(tmp_path, program))
    for storages in ({}, {"0": (5, raw)}, {"0": (6, raw[:-1])}, {"1": (6, raw)}):
        complaint(write_legacy(tmp_path, program, storages))
    for keys in ([[]], [None], ["0", "x"]):
        path = write_legacy(tmp_path, program, {"0": (6, raw)}, keys=keys)
        assert "a storage without a tensor" in complaint(path)
    for keys in ([], {}, "0"):
        path = write_legacy(tmp_path, program, {"0": (6, raw)}, keys=keys)
        assert "a tensor without its storage" in complaint(path)


def test_a_member_larger_than_the_file_is_not_read(tmp_path):
    """Its size stands in the archive's directory too, and would be set aside."""
    storage = storage_of("FloatStorage", "0", 2**30 - 4)
    program = dict_of(a=tensor_of(storage, 0, [1], [1]))
    path = write_zip(tmp_path, program, {"0": NUMBERS.tobytes()})
    content = path.read_bytes()
    sizes = struct.pack("<II", 24, 24)
    assert content.count(sizes) == 2
    path.write_bytes(content.replace(sizes, struct.pack("<II", 2**32 - 16, 2**32 - 16)))
    assert f"(a storage of {2**32 - 16} bytes)" in complaint(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    program = b"\x80\x02" + dict_of(a=GOOD) + b"."
    for packed in ("archive/data.pkl", "archive/data/0"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (
                ("archive/data.pkl", program),
                ("archive/data/0", NUMBERS.tobytes()),
            ):
                method = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
                archive.writestr(name, content, method)
        assert f"has {packed} compressed" in complaint(path)


def test_a_pickle_beyond_all_measure_is_refused(tmp_path):
    path = write_zip(tmp_path, b"N0" * (2**23 + 1) + b"}")
    assert "save the state dict alone" in complaint(path)


# Damaged files


def healthy_files(folder):
    """A small file of either format, with what it holds."""
    second = np.arange(4, dtype="<i8")
    program = dict_of(
        first=tensor_of(STORAGE, 0, [2, 3], [3, 1]),
        second=tensor_of(storage_of("LongStorage", "1", 4), 0, [4], [1]),
    )
    raw = {"0": NUMBERS.tobytes(), "1": second.tobytes()}
    expected = {"first": NUMBERS.reshape(2, 3), "second": second}
    counted = {"0": (6, raw["0"]), "1": (4, raw["1"])}
    yield write_zip(folder, program, raw, byteorder="little").read_bytes(), expected
    yield write_legacy(folder, program, counted).read_bytes(), expected


def is_whole(path, expected):
    """Whether the file gives exactly what is expected; else it gives a sentence."""
    try:
        found = read_torch_file(path)
    except UserError:
        return False
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    return True


def test_a_file_cut_anywhere_gives_a_sentence(tmp_path):
    path = tmp_path / "cut.pth"
    for content, expected in healthy_files(tmp_path):
        path.write_bytes(content)
        assert is_whole(path, expected)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert not is_whole(path, expected)
        path.write_bytes(content + b"\0" * 7)
        is_whole(path, expected)


def test_torchs_own_file_cut_anywhere_gives_a_sentence(torch, save):
    content = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(5)}
    path = save(content)
    whole = path.read_bytes()
    expected = {name: tensor.numpy() for name, tensor in content.items()}
    assert is_whole(path, expected)
    for length in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        path.write_bytes(whole[:length])
        assert not is_whole(path, expected)


def test_flipped_bits_in_a_zip_give_a_sentence_or_change_nothing(tmp_path):
    chance = random.Random(0)
    content, expected = next(healthy_files(tmp_path))
    path = tmp_path / "flipped.pth"
    wholes = 0
    for _ in range(1000):
        flipped = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        wholes += is_whole(path, expected)
    # Dates and other facts of no use here may change, the rest may not.
    assert 0 < wholes < 500


def test_flipped_bits_in_a_legacy_file_give_a_sentence_or_arrays(tmp_path):
    """That format has no checksum: a changed number goes unseen, a crash does not."""
    chance = random.Random(1)
    _, (content, expected) = healthy_files(tmp_path)
    path = tmp_path / "flipped.pth"
    # The two sizes of the storages and the numbers in them.
    numbers = len(content) - (8 + 24 + 8 + 32)
    shapes = {name: array.shape for name, array in expected.items()}
    refused = read = 0
    for _ in range(1000):
        flipped = bytearray(content)
        place = chance.randrange(len(content))
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_torch_file(path)
        except UserError:
            refused += 1
            continue
        read += 1
        assert all(isinstance(array, np.ndarray) for array in found.values())
        if place >= numbers:
            assert {name: array.shape for name, array in found.items()} == shapes
    assert refused > 200
    assert read > 50


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    for content, words in (
        (b"", "is empty"),
        (b"hello", "is not a file of weights"),
        (b"PK", "is not a file of weights"),
        (b"PK\x03\x04", "is damaged or cut short"),
        (b"\x80", "is damaged or cut short"),
        (pickle.dumps({"a": 1}), "not one of a known version of torch.save"),
        (pickle.dumps(MAGIC) + pickle.dumps(1002), "not one of a known version"),
        (np.arange(9.0).tobytes(), "is not a file of weights"),
    ):
        path.write_bytes(content)
        assert words in complaint(path)
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert "without the data.pkl" in complaint(tmp_path / "a.npz")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "a.npz", "storages")
    assert "is not a file of weights" in complaint(path)
