import gzip
import os
import struct
import subprocess
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from resnet_jax.config import default_config, resolve
from resnet_jax.data import images
from resnet_jax.data.digits import is_test_image
from resnet_jax.data.sources import open_collection, open_sources
from resnet_jax.errors import UserError
from tests.conftest import write_image_folder

RNG = np.random.default_rng(0)


def opened(config):
    data = resolve(config).data
    return open_sources(data, open_collection(data))


def sources(**data):
    config = default_config()
    config.training.steps = 1
    config.data.update(data)
    train, test, _ = opened(config)
    return train, test


def pixels(source):
    return np.stack(
        [images.decode(source[i], source.channels) for i in range(len(source))]
    )


def labels(source):
    return np.array([source[i].label for i in range(len(source))])


def test_digits_are_sklearns_in_a_stratified_split(tfds_dir):
    train, test = sources(name="digits", data_dir=tfds_dir)
    assert (len(train), len(test)) == (1437, 360)
    raw = load_digits()
    found = np.concatenate([pixels(train), pixels(test)])[..., 0]
    expected = np.rint(raw.images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)
    share = np.bincount(raw.target) / 5
    np.testing.assert_allclose(np.bincount(labels(test)), share, atol=1)


def test_digits_split_is_fixed():
    chosen = is_test_image(load_digits().target)
    # Written down on 2026-11-21: figures of other days compare only if it stays.
    assert list(np.flatnonzero(chosen)[:8]) == [2, 10, 12, 13, 25, 26, 31, 38]
    assert chosen.sum() == 360


def test_sub_splits_of_tfds_are_read(tfds_dir):
    train, test = sources(
        name="digits",
        data_dir=tfds_dir,
        train_split="train[:10%]",
        test_split="train[90%:]",
    )
    assert (len(train), len(test)) == (144, 144)


def test_a_part_held_out_shares_no_example_with_the_others(tfds_dir):
    config = default_config()
    config.training.steps = 1
    config.data.data_dir = tfds_dir
    config.data.train_split, config.data.holdout_split = "train[:90%]", "train[90%:]"
    train, test, holdout = opened(config)
    assert (len(train), len(holdout), len(test)) == (1293, 144, 360)
    for split, others in (("train[80%:]", "train"), ("test[:1]", "test_split=test")):
        config.data.holdout_split = split
        with pytest.raises(UserError, match=rf"{others}.* share"):
            opened(config)
    config.data.holdout_examples = 5
    with pytest.raises(UserError, match=r"data\.holdout_examples=5 exclude each other"):
        resolve(config)


def test_a_part_held_out_may_choose(tfds_dir):
    config = default_config()
    config.training.steps = 1
    config.checkpoint.best = True
    with pytest.raises(UserError, match=r"data.holdout_examples or data.holdout_split"):
        resolve(config)
    config.data.train_split, config.data.holdout_split = "train[:90%]", "train[90%:]"
    config.schedule.kind = "plateau"
    assert resolve(config).checkpoint.best


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"name": "digitz"}, "did you mean digits"),
        ({"name": "cifar_10"}, "did you mean cifar10"),
        ({"name": "digits", "test_split": "validation"}, "no split 'validation'"),
    ],
)
def test_tfds_faults_are_named(tfds_dir, data, sentence):
    with pytest.raises(UserError) as error:
        sources(data_dir=tfds_dir, **data)
    assert sentence in str(error.value)


def test_what_needs_tensorflow_says_which_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_jax.data.sources.tfds._has_tensorflow", lambda: False)
    with pytest.raises(UserError, match=r"pip install -e '.*\[tensorflow\]'"):
        sources(name="cifar10", data_dir=str(tmp_path))


def test_folder_reads_classes_in_order(image_folder):
    train, test = sources(path=str(image_folder))
    assert list(train.class_names) == ["ant", "bee", "cat"]
    assert list(labels(train)) == [0] * 6 + [1] * 6 + [2] * 6
    expected = cv2.imread(str(image_folder / "test" / "bee" / "1.png"))[..., ::-1]
    np.testing.assert_array_equal(pixels(test)[3], expected)


def test_folder_faults_are_named(image_folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        sources(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no split 'val'; its splits are test, train"):
        sources(path=str(image_folder), test_split="val")
    file = tmp_path / "data.tar"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"unpack it"):
        sources(path=str(file))
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    (empty / "test").mkdir()
    with pytest.raises(UserError, match=r"has no class folders"):
        sources(path=str(empty))
    (empty / "train" / "ant").mkdir()
    with pytest.raises(UserError, match=r"holds no images"):
        sources(path=str(empty))
    (image_folder / "test" / "wasp").mkdir()
    with pytest.raises(UserError, match=r"class wasp, which the training split lacks"):
        sources(path=str(image_folder))


def test_a_class_may_be_missing_in_the_test_split(tmp_path):
    root = write_image_folder(tmp_path, {"train": 2})
    write_image_folder(tmp_path, {"test": 2}, classes=("ant", "cat"))
    _, test = sources(path=str(root))
    assert list(labels(test)) == [0, 0, 2, 2]


def test_cifar_binary(tmp_path):
    images_of = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        label = RNG.integers(0, 10, (7, 1), dtype=np.uint8)
        planes = RNG.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
        np.concatenate([label, planes.reshape(7, -1)], axis=1).tofile(tmp_path / name)
        images_of[name] = label[:, 0], planes
    (tmp_path / "batches.meta.txt").write_text(
        "airplane\nautomobile\n" + "\n".join("23456789") + "\n\n", "utf-8-sig"
    )
    train, test = sources(path=str(tmp_path))
    assert (len(train), len(test)) == (35, 7)
    assert train.class_names[:2] == ["airplane", "automobile"]
    label, planes = images_of["data_batch_3.bin"]
    np.testing.assert_array_equal(labels(train)[14:21], label)
    # Red, green and blue planes one after another, each by rows.
    np.testing.assert_array_equal(pixels(train)[14, 5, 9], planes[0, :, 5, 9])
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"data_batch_2\.bin has 3 bytes"):
        sources(path=str(tmp_path))
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin is missing"):
        sources(path=str(tmp_path))


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10 with two images in each file."""
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        np.zeros((2, 3073), np.uint8).tofile(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (b"a\nb\n", r"batches\.meta\.txt has 2 names of classes"),
        (b"\n".join(b"abcdefghijk"[i : i + 1] for i in range(11)), r"has 11 names"),
        (b"a\n" * 10, r"has 10 names of classes, 1 of them different; expected 10"),
        (b"\x80\x04", r"batches\.meta\.txt is not a text in UTF-8"),
    ],
)
def test_faults_in_cifars_names_are_named(cifar, names, sentence):
    (cifar / "batches.meta.txt").write_bytes(names)
    with pytest.raises(UserError, match=sentence):
        sources(path=str(cifar))


def test_a_label_out_of_range_is_named(cifar):
    rows = np.zeros((4, 3073), np.uint8)
    rows[2:, 0] = 10
    rows.tofile(cifar / "data_batch_4.bin")
    with pytest.raises(
        UserError,
        match=r"image 2 of .*data_batch_4\.bin has the label 10, but the 10 classes",
    ):
        sources(path=str(cifar))


@pytest.mark.parametrize(
    "name", ["data_batch_3.bin", "test_batch.bin", "batches.meta.txt", "manifest.json"]
)
def test_a_pipe_in_place_of_a_file_is_named(cifar, name):
    (cifar / name).unlink(missing_ok=True)
    os.mkfifo(cifar / name)
    with pytest.raises(UserError, match=rf"{name} .*it is not a regular file"):
        sources(path=str(cifar))


def test_cifar100_binary_takes_the_fine_label(tmp_path):
    for name in ("train.bin", "test.bin"):
        rows = RNG.integers(0, 256, (3, 2 + 3072), dtype=np.uint8)
        rows[:, 0], rows[:, 1] = 5, [10, 20, 99]
        rows.tofile(tmp_path / name)
    train, _ = sources(path=str(tmp_path))
    assert list(labels(train)) == [10, 20, 99]
    assert len(train.class_names) == 100


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(header + array.tobytes())


def test_idx_files_gzipped_or_not(tmp_path):
    train_images = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train_images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([4, 0, 3, 1, 2], np.uint8))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", train_images[:2])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([1, 0], np.uint8))
    train, test = sources(path=str(tmp_path))
    np.testing.assert_array_equal(pixels(train)[..., 0], train_images)
    assert list(labels(train)) == [4, 0, 3, 1, 2]
    assert (len(test), train.channels, len(train.class_names)) == (2, 1, 5)
    whole = (tmp_path / "t10k-images-idx3-ubyte").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"damaged or not an idx file"):
        sources(path=str(tmp_path))
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match=r"is missing among the idx files"):
        sources(path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "t10k-labels-idx1-ubyte",
            [0, 5],
            r"image 1 of .*t10k-labels.* the label 5, b",
        ),
        (
            "train-images-idx3-ubyte",
            np.zeros((2, 0, 4)),
            r"its shape \(2, 0, 4\) is em",
        ),
        ("train-labels-idx1-ubyte", [], r"its shape \(0,\) is empty"),
        ("train-images-idx3-ubyte", np.zeros((2, 4)), r"bytes in 3 dimensions"),
        ("train-labels-idx1-ubyte", np.zeros((2, 1)), r"bytes in 1 dimensions"),
        ("train-labels-idx1-ubyte", [0, 1, 1], r"has 2 images and 3 labels"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, r"the \d+ bytes"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03", r"not an idx file"),
        ("train-images-idx3-ubyte", None, r"not a regular file"),
        # 64 MiB of zeros after what the header says.
        ("train-images-idx3-ubyte.gz", "bomb", r"does not hold the 32 bytes"),
    ],
)
def test_faults_of_idx_files_are_named(tmp_path, name, content, sentence):
    for split in ("train", "t10k"):
        images_of = np.zeros((2, 4, 4), np.uint8)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", images_of)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", np.array([0, 1], np.uint8))
    file = tmp_path / name
    (tmp_path / name.removesuffix(".gz")).unlink()
    if content is None:
        file.symlink_to("/dev/zero")
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        with gzip.open(file, "wb", compresslevel=1) as opened:
            opened.write(struct.pack(">HBBIII", 0, 8, 3, 2, 4, 4))
            for _ in range(64):
                opened.write(bytes(2**20))
    else:
        write_idx(file, np.array(content, np.uint8))
    tracemalloc.start()
    with pytest.raises(UserError, match=sentence):
        sources(path=str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


PREPARE_SHAPES = """
import io, sys
import cv2, numpy as np
import tensorflow_datasets as tfds

class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "id": np.int64,
                "picture": tfds.features.Image(shape=(6, 5, 3), encoding_format="png"),
                "kind": tfds.features.ClassLabel(names=["disc", "ring"]),
            }),
        )

    def _split_generators(self, dl_manager):
        counts = {"train": 4, "validation": 2}
        return {k: self._generate_examples(n) for k, n in counts.items()}

    def _generate_examples(self, count):
        for i in range(count):
            _, png = cv2.imencode(".png", np.full((6, 5, 3), 10 * i, np.uint8))
            yield i, {"id": i, "picture": io.BytesIO(png.tobytes()), "kind": i % 2}

TinyShapes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture
def shapes_dir(tmp_path):
    """A tfds data set that somebody else's code has prepared."""
    program = tmp_path / "prepare.py"
    program.write_text(PREPARE_SHAPES)
    folder = tmp_path / "prepared"
    subprocess.run(
        [sys.executable, str(program), str(folder)], check=True, capture_output=True
    )
    return folder


def test_a_prepared_tfds_data_set_is_read_by_its_name_without_its_code(shapes_dir):
    for name in ("tiny_shapes", "tiny_shapes:2.0.0"):
        train, test = sources(
            name=name, data_dir=str(shapes_dir), test_split="validation"
        )
        assert (len(train), len(test)) == (4, 2)
        assert list(train.class_names) == ["disc", "ring"]
        found = {
            int(image[0, 0, 0]): label
            for image, label in zip(pixels(train), labels(train))
        }
        assert found == {0: 0, 10: 1, 20: 0, 30: 1}


@pytest.mark.parametrize("file", ["features.json", "tiny_shapes-train.array_record*"])
def test_a_pipe_in_a_tfds_data_set_is_named(shapes_dir, file):
    (path,) = (shapes_dir / "tiny_shapes" / "2.0.0").glob(file)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{path.name} is not a regular file"):
        sources(name="tiny_shapes", data_dir=str(shapes_dir), test_split="validation")


def test_a_tfds_data_set_prepared_as_tfrecord_says_what_to_do(shapes_dir):
    info = shapes_dir / "tiny_shapes" / "2.0.0" / "dataset_info.json"
    text = info.read_text()
    assert '"array_record"' in text
    info.write_text(text.replace('"array_record"', '"tfrecord"'))
    command = r"resnet-jax prepare tfds:tiny_shapes OUTPUT --data-dir .*prepared"
    with pytest.raises(UserError, match=command):
        sources(name="tiny_shapes", data_dir=str(shapes_dir), test_split="validation")
