import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

import resnet_jax
from resnet_jax.config import default_config, resolve
from resnet_jax.data import images
from resnet_jax.data.sources import imagenet, open_collection, open_path
from resnet_jax.data.sources.tars import open_tars
from resnet_jax.data.sources.tfrecords import TfRecordSource, masked_checksum
from resnet_jax.errors import UserError
from resnet_jax.prepare import verify
from tests.conftest import REPOSITORY, make_console, write_image_folder

CLASSES = ("n01440764", "n01443537", "n02099601")


def photo(width, height, seed=0):
    """A smooth image in colour."""
    rng = np.random.default_rng(seed)
    shape = (height // 32 + 2, width // 32 + 2, 3)
    coarse = rng.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def prepare(source, output, **options):
    return resnet_jax.prepare_dataset(source, output, console=make_console(), **options)


def all_examples(folder, split="train"):
    source = open_path(folder).source(split)
    return [source[i] for i in range(len(source))]


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.array_record")}


@pytest.fixture
def folder(tmp_path):
    """18 and 6 images of three classes."""
    return write_image_folder(tmp_path / "images", {"train": 6, "test": 2})


def examples(root, split):
    """A reader of the format that docs/data.md describes, without this library."""
    manifest = json.loads((root / "manifest.json").read_text())
    for shard in manifest["splits"][split]["shards"]:
        reader = ArrayRecordReader(str(root / shard["file"]))
        for place in range(shard["examples"]):
            record = reader.read([place])[0]
            label, length = struct.unpack_from("<iI", record)
            name = record[8 : 8 + length].decode()
            yield name, manifest["class_names"][label], record[8 + length :]


def test_a_folder_is_stored_as_it_is(folder, tmp_path):
    manifest = prepare(folder, tmp_path / "out", num_shards=4)
    found = {
        name: (kind, image) for name, kind, image in examples(tmp_path / "out", "train")
    }
    expected = {
        f"{file.parent.name}/{file.name}": (file.parent.name, file.read_bytes())
        for file in (folder / "train").glob("*/*.png")
    }
    assert found == expected
    assert len(found) == manifest["splits"]["train"]["examples"] == 18
    shards = manifest["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == [
        f"train-{i:05d}-of-00004.array_record" for i in range(4)
    ]
    assert max(s["examples"] for s in shards) - min(s["examples"] for s in shards) <= 1
    for shard in shards:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [
            shard["file"]
            for split in manifest["splits"].values()
            for shard in split["shards"]
        ]
        + ["manifest.json"]
    )


def test_what_was_prepared_is_opened_by_its_path(folder, tmp_path):
    prepare(folder, tmp_path / "out", num_shards=3)
    config = default_config()
    config.training.steps = 1
    config.data.path = str(tmp_path / "out")
    collection = open_collection(resolve(config).data)
    description = collection.description
    assert description.class_names == ("ant", "bee", "cat")
    assert dict(description.num_examples) == {"test": 6, "train": 18}
    whole, part = collection.source("train"), collection.source("train[50%:]+test")
    assert [part[i].name for i in range(9)] == [whole[i].name for i in range(9, 18)]
    # The order is a mixture of the classes, the same every time.
    assert len({whole[i].label for i in range(6)}) > 1
    sent = pickle.dumps(whole)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert [again[i].image for i in range(18)] == [whole[i].image for i in range(18)]


def test_two_runs_give_the_same_bytes_whatever_the_threads(folder, tmp_path):
    first = prepare(folder, tmp_path / "a", num_shards=4, threads=1)
    second = prepare(folder, tmp_path / "b", num_shards=4, threads=4)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert first["splits"] == second["splits"]


def test_large_images_are_made_smaller_and_no_others(tmp_path):
    source = tmp_path / "images" / "train" / "a"
    source.mkdir(parents=True)
    wide, small = photo(400, 200), photo(64, 90)
    palette = photo(400, 200, 2).quantize(64, dither=Image.Dither.NONE)
    grey = photo(200, 400, 3).convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    stored = {
        "wide.jpg": encoded(wide, quality=98),
        "small.jpg": encoded(small),
        "cmyk.jpg": encoded(wide.convert("CMYK"), quality=98),
        "grey.png": encoded(grey, "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "alpha.png": encoded(wide.convert("RGBA"), "PNG"),
        "narrow.webp": encoded(photo(90, 700), "WEBP"),
    }
    for name, content in stored.items():
        (source / name).write_bytes(content)
    prepare(source.parent.parent, tmp_path / "out", shorter_side=100)
    found = {each.name[2:]: each.image for each in all_examples(tmp_path / "out")}
    assert found.keys() == stored.keys()
    kept = {name for name in stored if found[name] == stored[name]}
    assert kept == {"small.jpg", "narrow.webp"}
    originals = {
        "wide.jpg": wide,
        "cmyk.jpg": wide,
        "alpha.png": wide,
        "grey.png": grey.convert("RGB"),
        "deep.png": grey.convert("RGB"),
        "palette.png": palette.convert("RGB"),
    }
    for name, original in originals.items():
        opened = Image.open(io.BytesIO(found[name]))
        assert (opened.format, opened.mode) == ("JPEG", "RGB")
        assert min(opened.size) == 100
        assert max(opened.size) == 200
        # Reduced by two, Pillow's box filter is the mean of four pixels, too.
        reduced = original.resize(opened.size, Image.Resampling.BOX)
        expected = Image.open(io.BytesIO(encoded(reduced, quality=95)))
        difference = np.asarray(opened, float) - np.asarray(expected, float)
        assert np.abs(difference).mean() < 1.5, name
    # Quality 95 is that of the standard's tables: a fixed entry of the first one.
    assert Image.open(io.BytesIO(found["wide.jpg"])).quantization[0][0] == 2


def test_with_a_quality_all_images_are_encoded_that_are_smaller_then(tmp_path):
    source = tmp_path / "images" / "train" / "a"
    source.mkdir(parents=True)
    stored = {
        "large.jpg": encoded(photo(120, 80), quality=100),
        "lossless.png": encoded(photo(120, 80), "PNG"),
        "small.jpg": encoded(photo(120, 80), quality=5, optimize=True),
    }
    for name, content in stored.items():
        (source / name).write_bytes(content)
    prepare(source.parent.parent, tmp_path / "out", quality=90)
    found = {each.name[2:]: each.image for each in all_examples(tmp_path / "out")}
    assert found["small.jpg"] == stored["small.jpg"]
    for name in ("large.jpg", "lossless.png"):
        assert len(found[name]) < len(stored[name])
        opened = Image.open(io.BytesIO(found[name]))
        assert opened.size == (120, 80)
        assert opened.quantization[0][0] == 3  # quality 90, by the standard's tables
        assert [opened.layer[i][1:3] for i in range(3)] == [(2, 2), (1, 1), (1, 1)]
        original = np.asarray(Image.open(io.BytesIO(stored[name])), float)
        assert np.abs(np.asarray(opened, float) - original).mean() < 4


def write_tars(root, folder, split):
    """ImageNet's tars of the images in a folder, as they are distributed."""
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as train:
        for name in sorted(os.listdir(folder / "train"), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in sorted((folder / "train" / name).iterdir(), reverse=True):
                    tar.add(file, arcname=file.name)
            entry = tarfile.TarInfo(f"{name}.tar")
            entry.size = inner.tell()
            inner.seek(0)
            train.addfile(entry, inner)
    with tarfile.open(root / f"ILSVRC2012_img_{split}.tar", "w") as tar:
        for file in sorted((folder / split).iterdir()):
            tar.add(file, arcname=f"./{file.name}")


@pytest.fixture
def extracted(tmp_path):
    """ImageNet as extracted, with a list; three classes."""
    root = write_image_folder(tmp_path / "imagenet", {"train": 5}, classes=CLASSES)
    (root / "val").mkdir()
    names = [imagenet.VALIDATION_NAME.format(i) for i in range(1, 8)]
    for i, name in enumerate(names):
        (root / "val" / name).write_bytes(encoded(photo(20, 30, i)))
    lines = [f"{name} {CLASSES[i % 3]}" for i, name in enumerate(names)]
    (root / "val.txt").write_text("\n".join(lines))
    return root


def test_tars_give_the_same_shards_as_the_extracted_folders(extracted, tmp_path):
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars", extracted, "val")
    (tmp_path / "tars" / "val.txt").write_text((extracted / "val.txt").read_text())
    options = {"num_shards": 2, "splits": ("train", "val")}
    prepare(extracted, tmp_path / "a", **options)
    manifest = prepare(tmp_path / "tars", tmp_path / "b", **options)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert manifest["splits"]["val"]["examples"] == 7
    single = prepare(tmp_path / "tars" / "ILSVRC2012_img_train.tar", tmp_path / "c")
    assert list(single["splits"]) == ["train"]


def test_ignored_files_are_reported(extracted, tmp_path):
    (extracted / "train" / CLASSES[0] / "boxes.txt").write_text("")
    (extracted / "val" / "NOTES").write_text("")
    (extracted / "val" / "._1.JPEG").write_text("")
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars", extracted, "val")
    (tmp_path / "tars" / "val.txt").write_text((extracted / "val.txt").read_text())
    for source in (extracted, tmp_path / "tars"):
        console = make_console()
        output = tmp_path / f"{source.name}-out"
        resnet_jax.prepare_dataset(
            source, output, splits=("train", "val"), console=console
        )
        told = console.file.getvalue()
        assert re.search(r"train(\.tar)?: ignored 1 file: 1 \.txt\n", told)
        assert re.search(r"val(\.tar)?: ignored 1 file: 1 without an ending\n", told)
        assert told.count(": ignored ") == 2


def test_sources_are_read_by_many_threads_and_sent_to_processes(extracted, tmp_path):
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars", extracted, "val")
    prepare(extracted, tmp_path / "out", splits=("train",), num_shards=3)
    tars = open_tars({"train": tmp_path / "tars" / "ILSVRC2012_img_train.tar"})
    context = multiprocessing.get_context("spawn")
    for collection in (tars, open_path(extracted), open_path(tmp_path / "out")):
        source = collection.source("train[:5]+train[-4:]")
        expected = [source[i].image for i in range(9)]
        again = pickle.loads(pickle.dumps(source))
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(again.__getitem__, list(range(9)) * 20))
        assert [example.image for example in found] == expected * 20
        with context.Pool(1) as processes:
            found = processes.map(source.__getitem__, range(9))
        assert [example.image for example in found] == expected


def test_damaged_tars_are_refused(extracted, tmp_path):
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars", extracted, "val")
    path = tmp_path / "tars" / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    broken = bytearray(whole)
    broken[second.offset + 3] ^= 1  # tarfile takes it for the end
    for content, sentence in (
        (whole[: len(whole) // 2], r"cut short"),
        (bytes(broken), r"is cut short or damaged at byte"),
        (b"text", r"is not a tar, or it is damaged or compressed"),
        (b"", r"is not a tar, or it is damaged or compressed"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            prepare(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "kind", "sentence"),
    [
        (256**12 - 512, b"0", r"damaged at byte 512"),  # it would end where it begins
        (256**12 - 512, b"x", r"is not a tar, or it is damaged"),
        (128 * 256**11 + 2**50, b"0", r"is cut short in b\.jpg"),
        (128 * 256**11 + 2**50, b"L", r"damaged"),
    ],
)
def test_a_size_in_a_tar_that_lies_is_refused(tmp_path, size, kind, sentence):
    def header(name, size):
        fields = bytearray(tarfile.TarInfo(name).tobuf())
        fields[124:136] = size.to_bytes(12, "big")
        fields[156:157] = kind
        fields[148:156] = b" " * 8
        fields[148:156] = b"%06o\0 " % sum(fields)
        return bytes(fields)

    path = tmp_path / "train.tar"
    first = tarfile.TarInfo("a.jpg").tobuf()
    path.write_bytes(first + header("b.jpg", size) + bytes(1024))
    with pytest.raises(UserError, match=sentence):
        open_tars({"train": path})


def write_tfrecords(folder, per_shard, labels=(0, 1)):
    """A tfds data set as TFRecord, its frames written here; returns its images."""
    info = folder / "tiny_shapes" / "1.0.0"
    info.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["disc", "ring"]),
        }
    )
    expected = []
    for shard, count in enumerate(per_shard):
        name = f"tiny_shapes-train.tfrecord-{shard:05d}-of-{len(per_shard):05d}"
        with open(info / name, "wb") as file:
            for _ in range(count):
                content = encoded(photo(40, 30, len(expected)))
                label = labels[len(expected) % len(labels)]
                expected.append((content, label))
                example = features.serialize_example(
                    features.encode_example(
                        {
                            "file_name": f"{label}.jpg",
                            "image": io.BytesIO(content),
                            "label": label,
                        }
                    )
                )
                length = struct.pack("<Q", len(example))
                for part in (length, example):
                    file.write(part)
                    file.write(struct.pack("<I", masked_checksum(part)))
    tfds.folder_dataset.write_metadata(
        data_dir=str(info),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name="train",
                shard_lengths=list(per_shard),
                num_bytes=1,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=str(info),
                    dataset_name="tiny_shapes",
                    filetype_suffix="tfrecord",
                ),
            )
        ],
        check_data=False,
    )
    text = (info / "dataset_info.json").read_text()
    fields = json.loads(text) | {
        "name": "tiny_shapes",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
    }
    (info / "dataset_info.json").write_text(json.dumps(fields))
    return expected


def test_the_checksum_is_that_of_the_standard():
    # RFC 3720, B.4: CRC-32C of 32 zeros is 0x8a9136aa.
    crc = 0x8A9136AA
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    assert masked_checksum(bytes(32)) == (rotated + 0xA282EAD8) & 0xFFFFFFFF


NO_TENSORFLOW = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find_spec = finder.find_spec
def hiding(name, path=None, target=None):
    return None if name == "tensorflow" else find_spec(name, path, target)
finder.find_spec = hiding
from resnet_jax.cli import main
status = main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(status)
"""


def test_a_tfrecord_data_set_is_converted_by_the_command_of_its_error(tmp_path):
    expected = write_tfrecords(tmp_path / "tfds", per_shard=(3, 4))
    config = default_config()
    config.training.steps = 1
    config.data.name, config.data.data_dir = "tiny_shapes", str(tmp_path / "tfds")
    with pytest.raises(UserError) as error:
        open_collection(resolve(config).data)
    command = str(error.value).split("run resnet-jax ")[1].split(" and set")[0]
    words = command.replace("OUTPUT", str(tmp_path / "out")).split()
    assert words[0] == "prepare"
    done = subprocess.run(
        [sys.executable, "-c", NO_TENSORFLOW, *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    found = [(each.image, each.label) for each in all_examples(tmp_path / "out")]
    assert found == expected  # in tfds's order, so that sub-splits stay the same
    assert open_path(tmp_path / "out").description.class_names == ("disc", "ring")


def test_damaged_tfrecords_are_named(tmp_path):
    write_tfrecords(tmp_path / "tfds", per_shard=(3,))
    (file,) = (tmp_path / "tfds").rglob("*.tfrecord-*")
    whole = bytearray(file.read_bytes())
    data, length = whole.copy(), whole.copy()
    data[len(whole) // 2] ^= 1
    length[0] ^= 1
    for content, sentence in (
        (data, r"record .*00001\[\d\] is damaged: its checksum differs"),
        (length, r"is not a TFRecord file, or it is damaged at byte 0"),
        (whole[:-3], r"is cut short"),
        (whole + b"\0\0", r"is cut short|damaged at byte"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            prepare("tfds:tiny_shapes", tmp_path / "out", data_dir=tmp_path / "tfds")


def test_a_tfrecord_source_pickles(tmp_path):
    expected = write_tfrecords(tmp_path / "tfds", per_shard=(3,))
    builder = tfds.builder("tiny_shapes", data_dir=str(tmp_path / "tfds"))
    from resnet_jax.data.sources.tfrecords import open_tfrecords

    source = open_tfrecords(builder).source("train")
    assert isinstance(source, TfRecordSource)
    assert source[1].image == expected[1][0]
    assert pickle.loads(pickle.dumps(source))[2].label == expected[2][1]


def test_an_arrayrecord_data_set_of_tfds_keeps_its_order(tfds_dir, tmp_path):
    manifest = prepare("tfds:digits", tmp_path / "out", data_dir=tfds_dir)
    assert manifest["channels"] == 1
    config = default_config()
    config.training.steps = 1
    config.data.data_dir = tfds_dir
    before = open_collection(resolve(config).data)
    after = open_path(tmp_path / "out")
    assert after.description.image_shape == (8, 8, 1)
    for split in ("train[10%:20%]", "test[-3:]"):
        old, new = before.source(split), after.source(split)
        assert len(old) == len(new)
        for i in range(len(old)):
            assert (old[i].image, old[i].label) == (new[i].image, new[i].label)


SLOW = """
import signal, sys, time
from resnet_jax.data import images
# A shell ignores interrupts of what it runs in the background, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)
decode = images.decode
def slowly(*arguments):
    time.sleep(0.01)
    return decode(*arguments)
images.decode = slowly
from resnet_jax.__main__ import run
sys.exit(run())
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    source = write_image_folder(tmp_path / "images", {"train": 40, "test": 4})
    undisturbed = prepare(source, tmp_path / "a", num_shards=12, shorter_side=9)
    output = tmp_path / "b"
    arguments = ["prepare", str(source), str(output), "--shards=12", "--threads=2"]
    command = [sys.executable, "-c", SLOW, *arguments, "--shorter-side", "9"]
    kills = 0
    for shards in (0, 3, 9, 20):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if (output / "progress.json").exists() and (
                len(list(output.glob("*.array_record"))) >= shards
            ):
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.005)
        assert not (output / "manifest.json").exists()
        with pytest.raises(UserError, match=r"is only partly prepared"):
            open_path(output)
        with pytest.raises(UserError, match=r"holds no manifest.json"):
            verify(output, console=make_console())
    assert kills == 4
    console = make_console()
    resumed = resnet_jax.prepare_dataset(
        source, output, num_shards=12, shorter_side=9, console=console
    )
    assert "of 24 shards are already written" in console.file.getvalue()
    assert shard_bytes(output) == shard_bytes(tmp_path / "a")
    for manifest in (undisturbed, resumed):
        del manifest["created"]
    assert resumed == undisturbed
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "a"))


def test_an_interrupt_is_one_sentence_and_the_command_goes_on(tmp_path):
    source = write_image_folder(tmp_path / "images", {"train": 40})
    arguments = ["prepare", str(source), str(tmp_path / "out"), "--shards=12"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "out").glob("*.array_record")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert told.count("\n") == 1
    assert "the same command continues from the last checkpoint or shard" in told
    prepare(source, tmp_path / "out", num_shards=12)


def stopped_half_way(source, output):
    """Stops ``prepare`` at a broken image in the last shard."""
    broken = source / "train" / "cat" / "5.png"
    content = broken.read_bytes()
    broken.write_bytes(b"text")
    with pytest.raises(UserError, match=r"cat/5\.png cannot be decoded.*--on-error"):
        prepare(source, output, num_shards=6, threads=1)
    broken.write_bytes(content)
    assert (output / "progress.json").exists()


def test_other_settings_over_a_half_prepared_folder_are_refused(folder, tmp_path):
    output = tmp_path / "out"
    stopped_half_way(folder, output)
    for options, named in (
        ({"num_shards": 5}, r"another num_shards \(6 before, 5 now\)"),
        ({"num_shards": 6, "shorter_side": 8}, r"another shorter_side \(None before"),
        ({"num_shards": 6, "splits": ["train"]}, r"another splits; give an empty"),
    ):
        with pytest.raises(UserError, match=named):
            prepare(folder, output, **options)
    renamed = folder / "train" / "ant" / "0.png"
    renamed.rename(renamed.with_name("00.png"))
    with pytest.raises(UserError, match=r"another splits; give an empty folder, or"):
        prepare(folder, output, num_shards=6)
    renamed.with_name("00.png").rename(renamed)
    done = prepare(folder, output, num_shards=6)
    assert prepare(folder, output, num_shards=6) == done
    with pytest.raises(UserError, match=r"another quality|another shorter_side"):
        prepare(folder, output, num_shards=6, shorter_side=8)


def test_a_shard_lost_or_damaged_between_two_runs_is_noticed(folder, tmp_path):
    output = tmp_path / "out"
    stopped_half_way(folder, output)
    expected = prepare(folder, tmp_path / "other", num_shards=6)["splits"]
    done = sorted(output.glob("*.array_record"))
    assert len(done) >= 2
    done[0].unlink()
    content = bytearray(done[1].read_bytes())
    content[50] ^= 1
    done[1].write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{done[1].name} is damaged: its checksum differs"
    ):
        prepare(folder, output, num_shards=6)
    assert not (output / "manifest.json").exists()
    done[1].unlink()
    assert prepare(folder, output, num_shards=6)["splits"] == expected


@pytest.fixture
def prepared(folder, tmp_path):
    prepare(folder, tmp_path / "out", num_shards=2)
    return tmp_path / "out"


def test_a_flipped_byte_is_found_wherever_it_is(prepared):
    verify(prepared, console=make_console())
    (file, *_) = sorted(prepared.glob("train-*"))
    whole = file.read_bytes()
    for place in (0, 100, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{file.name} is damaged"):
            verify(prepared, console=make_console())
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{file.name} has \d+ bytes instead of \d+"):
        verify(prepared, console=make_console())
    file.unlink()
    with pytest.raises(UserError, match=rf"shard .*{file.name} is missing"):
        verify(prepared, console=make_console())


@pytest.mark.parametrize("fault", ["flip", "truncate", "empty", "missing"])
def test_reading_a_damaged_shard_names_it(prepared, fault):
    for file in prepared.glob("train-*"):
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        if fault == "missing":
            file.unlink()
        else:
            lengths = {"flip": len(whole), "truncate": len(whole) // 2, "empty": 0}
            file.write_bytes(whole[: lengths[fault]])
    source = open_path(prepared).source("train")
    with pytest.raises(UserError, match=r"shard .*train-0000.* is missing or damaged"):
        [source[i] for i in range(len(source))]


def test_a_damaged_manifest_is_refused(prepared):
    file = prepared / "manifest.json"
    text = file.read_text()
    for content, sentence in (
        (text[:-20], r"manifest\.json is damaged"),
        ("[]", r"manifest\.json is damaged"),
        ('{"format": "other"}', r"its format is 'other'"),
        (text.replace('"version": 1', '"version": 9'), r"has version 9 of the layout"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=sentence):
            open_path(prepared)


def set_field(content, path, value):
    """Sets a field such as splits/train/examples; deletes it if the value is None."""
    *outer, last = path.split("/")
    for key in outer:
        content = content[int(key) if isinstance(content, list) else key]
    last = int(last) if isinstance(content, list) else last
    if value is None:
        del content[last]
    else:
        content[last] = value


SHARD = "splits/train/shards/0"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("version", "1", r"version of it is '1', not int"),
        ("version", True, r"version of it is True, not int"),
        ("class_names", None, r"it lacks class_names"),
        ("class_names", [], r"class_names is empty"),
        ("class_names", ["a", 1], r"class_names holds other types"),
        ("class_names", ["a", "a"], r"class_names holds a name twice"),
        ("channels", 2, r"channels is 2, not 1 or 3"),
        (
            "image_shape",
            [8, 8, 1],
            r"image_shape is \[8, 8, 1\], not \[height, width, 3",
        ),
        ("image_shape", [0, 8, 3], r"image_shape is"),
        ("image_shape", "8x8", r"image_shape is"),
        ("settings", None, r"it lacks settings"),
        ("source", [], r"source of it is \[\], not dict"),
        ("splits", {}, r"splits is empty"),
        ("splits/train", [], r"split train is \[\], not an object"),
        ("splits/train/examples", -18, r"examples of split train is -18, below 0"),
        ("splits/train/examples", 17, r"states 17 examples, but its shards hold 18"),
        ("splits/train/bytes", 1.5, r"bytes of split train is 1\.5, not int"),
        ("splits/train/shards", [], r"states 18 examples, but its shards hold 0"),
        ("splits/train/left_out", [{"index": -1}], r"index of left_out .* is -1"),
        (SHARD, "x", r"shard 0 of split train is 'x', not an object"),
        (f"{SHARD}/examples", -9, r"examples of shard 0 of split train is -9, below 0"),
        (f"{SHARD}/file", "../x", r"file of shard 0 .* is '\.\./x', not the name of"),
        (f"{SHARD}/file", "\ud800", r"not the name of a file"),
        (f"{SHARD}/file", "test-00000-of-00002.array_record", r"names test-0.* twice"),
        (f"{SHARD}/sha256", "abc", r"sha256 of shard 0 of split train is 'abc'"),
    ],
)
def test_every_field_of_a_manifest_is_checked(prepared, path, value, sentence):
    file = prepared / "manifest.json"
    manifest = json.loads(file.read_text())
    set_field(manifest, path, value)
    file.write_text(json.dumps(manifest))
    for read in (open_path, functools.partial(verify, console=make_console())):
        with pytest.raises(UserError, match=rf"manifest\.json is damaged .*{sentence}"):
            read(prepared)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("settings", None, r"it lacks settings"),
        ("guessed_bytes", "5", r"guessed_bytes of it is '5', not int"),
        ("num_shards/train", 0, r"num_shards of train is 0"),
        ("num_shards/test", None, r"num_shards lacks test"),
        ("done", [], r"done of it is \[\], not dict"),
        ("done/FIRST/examples", 2, r"has 2 examples instead of 3"),
        ("done/FIRST/examples", -3, r"examples of .* is -3, below 0"),
        ("done/FIRST/file", "other", r"lists the file other"),
        ("done/FIRST/left_out", None, r"lacks left_out"),
        ("done/FIRST/sha256", None, r"lacks sha256"),
    ],
)
def test_every_field_of_the_progress_is_checked(
    folder, tmp_path, path, value, sentence
):
    output = tmp_path / "out"
    stopped_half_way(folder, output)
    file = output / "progress.json"
    progress = json.loads(file.read_text())
    first = "train-00000-of-00006.array_record"
    set_field(progress, path.replace("FIRST", first), value)
    file.write_text(json.dumps(progress))
    with pytest.raises(UserError, match=rf"progress\.json is damaged: .*{sentence}"):
        prepare(folder, output, num_shards=6)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"progress\.json .* not a regular file"):
        prepare(folder, output, num_shards=6)


def test_a_record_with_a_label_of_no_class_is_named(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["class_names"].pop()
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    source = open_path(prepared).source("train")
    with pytest.raises(
        UserError,
        match=r"train-0000\d.* damaged at example \d+: cat/\d\.png has the label 2, ",
    ):
        [source[i] for i in range(len(source))]


def test_a_pipe_in_place_of_a_shard_or_tar_is_named(prepared, tmp_path):
    (shard, *_) = sorted(prepared.glob("train-*"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=rf"{shard.name} is not a regular file"):
        open_path(prepared).source("train")
    with pytest.raises(UserError, match=rf"{shard.name} is not a regular file"):
        verify(prepared, console=make_console())
    os.mkfifo(tmp_path / "ILSVRC2012_img_train.tar")
    with pytest.raises(UserError, match=r"train\.tar cannot be read: it is not a reg"):
        prepare(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "new")


def test_more_pixels_than_the_limit_are_left_out(folder, tmp_path):
    large = encoded(photo(90, 90), "PNG")
    (folder / "train" / "ant" / "large.png").write_bytes(large)
    limit = {"num_shards": 1, "max_image_pixels": 90 * 90 - 1}
    with pytest.raises(UserError, match=r"ant/large\.png .* max_image_pixels=8099"):
        prepare(folder, tmp_path / "out", **limit)
    manifest = prepare(folder, tmp_path / "out", on_error="skip", **limit)
    (left_out,) = manifest["splits"]["train"]["left_out"]
    assert left_out["name"] == "ant/large.png"


def test_broken_images_stop_or_are_left_out_and_listed(folder, tmp_path):
    good = (folder / "train" / "ant" / "0.png").read_bytes()
    jpeg = encoded(photo(30, 30))
    broken = {
        "ant/text.jpg": b"this is no image",
        "bee/empty.png": b"",
        "cat/cut.png": good[: len(good) // 2],
        "cat/cut.jpg": jpeg[: len(jpeg) // 2],
    }
    for name, content in broken.items():
        (folder / "train" / name).write_bytes(content)
    output = tmp_path / "out"
    with pytest.raises(UserError) as error:
        prepare(folder, output, num_shards=3)
    assert "example " in str(error.value)
    assert any(name in str(error.value) for name in broken)
    assert not (output / "manifest.json").exists()
    # The same command, but for --on-error, goes on with what is there.
    manifest = prepare(folder, output, num_shards=3, on_error="skip")
    left_out = manifest["splits"]["train"]["left_out"]
    assert {item["name"] for item in left_out} == set(broken)
    assert manifest["splits"]["train"]["examples"] == 18
    listed = open_path(folder).source("train")
    for item in left_out:
        assert listed.names[item["index"]] == item["name"]
    found = all_examples(output)
    assert len(found) == 18
    for example in found:
        assert images.decode(example, 3).shape == (10, 12, 3)


def test_file_names_that_are_not_utf8_are_kept(tmp_path):
    source = tmp_path / "images" / "train" / "a"
    source.mkdir(parents=True)
    for name, content in ((b"\xff.png", b"text"), (b"\xfe.png", None)):
        with open(os.fsencode(source) + b"/" + name, "wb") as file:
            file.write(content or encoded(photo(20, 20), "PNG"))
    manifest = prepare(tmp_path / "images", tmp_path / "out", on_error="skip")
    (example,) = all_examples(tmp_path / "out")
    assert os.fsencode(example.name) == b"a/\xfe.png"
    (left_out,) = manifest["splits"]["train"]["left_out"]
    assert os.fsencode(left_out["name"]) == b"a/\xff.png"


def test_examples_without_a_label_are_refused(tmp_path):
    write_tfrecords(tmp_path / "tfds", per_shard=(2,), labels=(0, -1))
    options = {"data_dir": tmp_path / "tfds"}
    with pytest.raises(
        UserError, match=r"tfrecord-00000-of-00001\[1\] has the label -1"
    ):
        prepare("tfds:tiny_shapes", tmp_path / "out", **options)
    manifest = prepare("tfds:tiny_shapes", tmp_path / "out", on_error="skip", **options)
    assert manifest["splits"]["train"]["examples"] == 1


def test_a_store_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def fails(path):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.exists", fails)
    with pytest.raises(UserError, match=r"gs://b/x cannot be reached: no route"):
        open_path("gs://b/x")


def test_a_split_of_broken_images_alone_is_refused(tmp_path):
    source = tmp_path / "images" / "train" / "a"
    source.mkdir(parents=True)
    (source / "1.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"every image of split train is broken"):
        prepare(tmp_path / "images", tmp_path / "out", on_error="skip")


def test_what_cannot_be_begun_is_one_sentence(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for source, output, sentence, options in (
        ("nowhere", "out", r"source nowhere does not exist; give a folder, a tar", {}),
        (tmp_path / "empty", "out", r"empty has no folders; expected", {}),
        (folder, folder / "out", r"is inside the source", {}),
        (folder, tmp_path / "full", r"holds notes\.txt, which resnet-jax prepare", {}),
        (folder, "gs://bucket/x", r"is not a folder of this machine", {}),
        (folder, "out", r"no split 'tain'; did you mean train", {"splits": ["tain"]}),
        (folder, "out", r"quality is a number from 1 to 100", {"quality": 0}),
        (folder, "out", r"threads must be at least 1", {"threads": 0}),
        ("tfds:nothing_such", "out", r"there is no tfds data set nothing_such", {}),
    ):
        target = tmp_path / output if "://" not in str(output) else output
        with pytest.raises(UserError, match=sentence) as error:
            prepare(source, target, **options)
        assert "\n" not in str(error.value)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"):
        prepare(folder, blocked / "out")
    monkeypatch.setattr(
        "resnet_jax.prepare.dataset.shutil.disk_usage",
        lambda folder: type("Usage", (), {"free": 10})(),
    )
    with pytest.raises(UserError, match=r"GB free, and about .* GB are needed"):
        prepare(folder, tmp_path / "out")


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it fails, as on a disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from resnet_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_becomes_full_is_one_sentence(tmp_path):
    source = write_image_folder(tmp_path / "images", {"train": 40}, shape=(40, 40))
    arguments = ["prepare", str(source), str(tmp_path / "out"), "--shards=2"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert "free space" in done.stderr
    assert not list((tmp_path / "out").glob("*.array_record"))
    # With space again the same command ends well.
    prepare(source, tmp_path / "out", num_shards=2)


def test_two_at_once_are_refused(folder, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    opened = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match=r"is being prepared by another process"):
            prepare(folder, tmp_path / "out")
    finally:
        os.close(opened)
