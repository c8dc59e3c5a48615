"""Prepare a data set: write its shards of ArrayRecord and the manifest that lists them.

``progress.json`` lists each finished shard. ``manifest.json`` comes last, after all
shards were checked once more. So a run that is killed at any moment continues with the
same command, and ends with the same bytes as an undisturbed run.

Shards hold the examples in a fixed random order, so that parts such as ``train[:90%]``
are random examples of all classes. tfds and prepared data sets were shuffled when they
were made; they keep their order.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rich.console
from etils import epath

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.console import say
from resnet_jax.data.order import epoch_order
from resnet_jax.data.sources import Collection, Source, open_path, records
from resnet_jax.data.sources.base import notes
from resnet_jax.data.sources.manifest import (
    check,
    check_left_out,
    check_shard,
    field,
)
from resnet_jax.data.sources.tars import find_tars, open_tars
from resnet_jax.errors import UserError, nearest
from resnet_jax.prepare import shards
from resnet_jax.prepare.encoding import Encoding
from resnet_jax.prepare.progress import in_threads
from resnet_jax.storage import (
    delete_leftovers,
    expand,
    locked,
    read_text,
    replacing,
    storage_of,
)

PROGRESS = "progress.json"
_ORDER_SEED = 2  # of the random order of the examples
_SAMPLE = 64  # examples of a split that are encoded to estimate its size


def prepare_dataset(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    data_dir: str | None = None,
    shorter_side: int | None = None,
    quality: int | None = None,
    num_shards: int | None = None,
    shard_mib: int = 512,
    threads: int | None = None,
    on_error: str = "stop",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Writes a data set as shards of ArrayRecord; continues an interrupted run.

    Args:
      source: a folder of SPLIT/CLASS/IMAGE, of CIFAR's or idx files, or of ImageNet's
        tars; a tar; a prepared data set; or ``tfds:NAME[:VERSION]``.
      output: the folder for the shards; new, or of an interrupted run.
      splits: the splits to convert; None means all.
      data_dir: where tfds data sets are prepared.
      shorter_side: pixels to which larger images are reduced; None keeps all sizes.
      quality: JPEG quality, 1 to 100, of all images that it makes smaller; None encodes
        only reduced images, with 95.
      num_shards: of each split; None follows from ``shard_mib``.
      shard_mib: approximate size of a shard in MiB.
      threads: shards to write at once; None means one per processor.
      on_error: "stop" at a broken image, or "skip" it and list it in the manifest.
      max_image_pixels: an image whose header states more pixels is broken.
      console: where to show progress.

    Returns:
      The manifest.

    Raises:
      UserError: the source or an image is broken, the folder holds something else, or
        the disk is full.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"quality is a number from 1 to 100, not {quality}")
    for name, value in {
        "shorter-side": shorter_side,
        "shards": num_shards,
        "shard-mib": shard_mib,
        "threads": threads,
        "max-image-pixels": max_image_pixels,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    folder = output_folder(source, output)
    return prepare_collection(
        open_source(source, data_dir),
        os.fspath(source),
        folder,
        splits=splits,
        encoding=Encoding(shorter_side, quality, max_image_pixels),
        num_shards=num_shards,
        shard_mib=shard_mib,
        threads=threads,
        on_error=on_error,
        console=console or rich.console.Console(),
    )


@dataclasses.dataclass(frozen=True)
class Annex:
    """What a prepared data set stores beside its shards, such as boxes.

    Attributes:
      settings: what determines it.
      write: writes its files into the folder, given the manifest's splits, and returns
        further fields of the manifest.
    """

    settings: Mapping[str, Any]
    write: Callable[[Path, Mapping[str, Any]], dict[str, Any]]


_NO_ANNEX = Annex({}, lambda folder, splits: {})


def prepare_collection(
    collection: Collection,
    given: str,
    folder: Path,
    *,
    splits: Sequence[str] | None,
    encoding: Encoding,
    num_shards: int | None,
    shard_mib: int,
    threads: int | None,
    on_error: str,
    console: rich.console.Console,
    annex: Annex = _NO_ANNEX,
) -> dict[str, Any]:
    """``prepare_dataset`` for a collection, and for what is to be stored beside it.

    Args:
      collection: the data set.
      given: where it is from, for the manifest.
      folder: from ``output_folder``.
      splits: see ``prepare_dataset``, and so for the other arguments.
      encoding: of the images.
      num_shards: of each split.
      shard_mib: approximate size of a shard.
      threads: shards to write at once.
      on_error: at a broken image.
      console: where to show progress.
      annex: what is stored beside the shards.

    Returns:
      The manifest.

    Raises:
      UserError: as in ``prepare_dataset``.
    """
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error is stop or skip, not {on_error!r}")
    sources = _open_splits(collection, splits)
    for note in (note for source in sources.values() for note in notes(source)):
        say(console, note)
    settings = _settings(collection, sources, encoding, num_shards, shard_mib)
    settings |= annex.settings
    run = functools.partial(in_threads, threads=threads, console=console)
    busy = f"output {folder} is being prepared by another process; wait for it"
    with locked(folder, busy):
        manifest = records.read_manifest(epath.Path(folder))
        if manifest is not None:
            _refuse_other_settings(folder, manifest["settings"], settings)
            (folder / PROGRESS).unlink(missing_ok=True)
            say(console, f"{folder} is already prepared; --verify checks it")
            return manifest
        progress = _begin(folder, given, settings, sources, encoding)
        _refuse_small_disk(folder, progress)
        if done := len(progress["done"]):
            total = sum(progress["num_shards"].values())
            say(console, f"{done} of {total} shards are already written")
        _write_missing(folder, progress, sources, encoding, on_error, run)
        manifest = _finish(folder, progress, collection, annex, run)
    for name, split in manifest["splits"].items():
        say(console, _summary(name, split))
    say(console, f"prepared and checked; train on it with data.path={folder}")
    return manifest


def _summary(name: str, split: dict[str, Any]) -> str:
    line = (
        f"{name}: {split['examples']:,} examples in {len(split['shards'])} shards, "
        f"{split['bytes'] / 1e6:,.1f} MB"
    )
    if left_out := split["left_out"]:
        line += f"; {len(left_out)} left out, such as {left_out[0]['name']}"
    return line


def verify(
    output: str | os.PathLike[str],
    *,
    threads: int | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Compares every shard of a prepared data set with the manifest's checksums.

    Args:
      output: the folder.
      threads: shards to read at once; None means one per processor.
      console: where to show progress.

    Raises:
      UserError: shards are missing or damaged; names the first and counts them.
    """
    folder = expand(output)
    manifest = records.read_manifest(epath.Path(folder))
    if manifest is None:
        raise UserError(
            f"{folder} holds no {records.MANIFEST}; give a folder that resnet-jax "
            "prepare has finished"
        )
    splits = manifest["splits"].values()
    found = [entry for split in splits for entry in split["shards"]]
    beside = list(manifest.get("annotations", {}).get("files", {}).values())
    console = console or rich.console.Console()
    run = functools.partial(in_threads, threads=threads, console=console)
    _verify(folder, found + beside, run)
    examples = sum(split["examples"] for split in splits)
    say(console, f"{folder}: all {len(found)} shards are whole, {examples} examples")


def open_source(source: str | os.PathLike[str], data_dir: str | None) -> Collection:
    """The data set that ``prepare_dataset`` reads.

    Raises:
      UserError: there is none.
    """
    given = os.fspath(source)
    if given.startswith("tfds:"):
        from resnet_jax.data.sources.tfds import find_builder, open_tfds
        from resnet_jax.data.sources.tfrecords import open_tfrecords

        name = given.removeprefix("tfds:")
        builder = find_builder(name, data_dir)
        if builder.is_prepared() and builder.info.file_format.value == "tfrecord":
            return open_tfrecords(builder)
        return open_tfds(name, data_dir)
    path = expand(given)
    if not path.exists():
        raise UserError(
            f"source {path} does not exist; give a folder, a tar or "
            "tfds:NAME[:VERSION] with --data-dir"
        )
    tars = find_tars(path)
    if tars and not (path.is_dir() and (path / "train").is_dir()):
        return open_tars(tars)
    return open_path(path)


def output_folder(
    source: str | os.PathLike[str], output: str | os.PathLike[str]
) -> Path:
    """The folder to prepare into, which can be written to.

    Raises:
      UserError: it cannot be, or it is inside the source.
    """
    if "://" in os.fspath(output):
        raise UserError(
            f"output {output} is not a folder of this machine; prepare into a folder "
            "and copy it to the store"
        )
    folder, around = expand(output).absolute(), expand(source).absolute()
    if around == folder or around in folder.parents:
        raise UserError(f"output {folder} is inside the source; give another folder")
    try:
        storage_of(folder).check_writable(folder)
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written to ({error.strerror}); give another"
        ) from error
    return folder


def _open_splits(
    collection: Collection, splits: Sequence[str] | None
) -> dict[str, Source]:
    known, opened = collection.description.splits, {}
    for split in splits or known:
        if split not in known:
            raise UserError(
                f"{collection.description.name} has no split {split!r}; "
                f"{nearest(split, known)}"
            )
        try:
            opened[split] = collection.source(split)
        except UserError as error:
            others = ",".join(name for name in known if name != split)
            hint = f" (to leave {split} out: --splits {others})" if others else ""
            raise UserError(f"{error}{hint}") from error
    return opened


def _settings(
    collection: Collection,
    sources: dict[str, Source],
    encoding: Encoding,
    num_shards: int | None,
    shard_mib: int,
) -> dict[str, Any]:
    """Everything that determines the bytes of the result, the source included."""
    class_names = "\n".join(collection.description.class_names)
    identities = {}
    for split, source in sources.items():
        names = shards.file_names(source)
        identities[split] = {
            "examples": len(source),
            "order": "of the source" if names is None else "shuffled",
            "names_sha256": None if names is None else names.checksum(),
        }
    return {
        "shorter_side": encoding.shorter_side,
        "quality": encoding.quality,
        "encoder": f"OpenCV {cv2.__version__}" if encoding.changes else None,
        "num_shards": num_shards,
        "shard_mib": None if num_shards else shard_mib,
        "class_names_sha256": hashlib.sha256(
            class_names.encode("utf-8", "surrogateescape")
        ).hexdigest(),
        "splits": identities,
    }


def _refuse_other_settings(
    folder: Path, before: dict[str, Any], now: dict[str, Any]
) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            brief = key in ("class_names_sha256", "splits")
            was = "" if brief else f" ({before.get(key)} before, {value} now)"
            raise UserError(
                f"output {folder} was begun with another {key}{was}; give an empty "
                "folder, or the same source and options"
            )


def _begin(
    folder: Path,
    source: str,
    settings: dict[str, Any],
    sources: dict[str, Source],
    encoding: Encoding,
) -> dict[str, Any]:
    """The progress of an interrupted run, or the plan of a new one."""
    file = folder / PROGRESS
    delete_leftovers(folder)
    with _progress_errors(file):
        if (text := read_text(file)) is not None:
            progress = _read_progress(text)
            _refuse_other_settings(folder, progress["settings"], settings)
            _check_done(progress, sources)
            done = progress["done"].items()
            kept = {name: entry for name, entry in done if (folder / name).exists()}
            return progress | {"settings": settings, "done": kept}
    others = sorted(entry.name for entry in folder.iterdir())
    if others:
        raise UserError(
            f"output {folder} holds {others[0]}, which resnet-jax prepare did not "
            "make; give a new or an empty folder"
        )
    sizes = {split: len(s) * _mean_size(s, encoding) for split, s in sources.items()}
    shard_bytes = (settings["shard_mib"] or 1) * 2**20
    num_shards = {}
    for split, size in sizes.items():
        count = settings["num_shards"] or max(1, -(-round(size) // shard_bytes))
        num_shards[split] = min(count, len(sources[split]))
    progress = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": source,
        "settings": settings,
        "guessed_bytes": round(sum(sizes.values())),
        "num_shards": num_shards,
        "done": {},
    }
    _write_json(file, progress)
    return progress


@contextlib.contextmanager
def _progress_errors(file: Path) -> Iterator[None]:
    """Raises UserError for errors of reading ``progress.json``."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is damaged: {reason}; empty {file.parent}") from error


def _read_progress(text: str) -> dict[str, Any]:
    """The content of ``progress.json``; raises ValueError if it has other fields."""
    progress = json.loads(text)
    check(isinstance(progress, dict), "it is not an object")
    kinds = {"created": str, "source": str, "settings": dict, "guessed_bytes": int}
    for name, kind in (kinds | {"num_shards": dict, "done": dict}).items():
        field(progress, name, kind, "it")
    for name, entry in progress["done"].items():
        check_shard(entry, name)
        check(entry["file"] == name, f"{name} lists the file {entry['file']}")
        check_left_out(field(entry, "left_out", list, name), name)
    return progress


def _check_done(progress: dict[str, Any], sources: dict[str, Source]) -> None:
    """Raises ValueError unless the shards that are done are shards of the sources."""
    for split, source in sources.items():
        count = field(progress["num_shards"], split, int, "num_shards")
        check(1 <= count <= len(source), f"num_shards of {split} is {count}")
    expected = {job.file: len(job.indices) for job in _jobs(progress, sources)}
    for name, entry in progress["done"].items():
        found = entry["examples"] + len(entry["left_out"])
        check(
            expected.get(name) == found,
            f"{name} has {found} examples instead of {expected.get(name)}",
        )


def _mean_size(source: Source, encoding: Encoding) -> float:
    """Mean size of an encoded example, estimated from examples across the split."""
    chosen = np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int)
    sizes = []
    for index in chosen:
        with contextlib.suppress(UserError):  # reported when its shard is written
            sizes.append(len(encoding.encode(source[int(index)], source.channels)))
    return float(np.mean(sizes)) if sizes else 0.0


def _refuse_small_disk(folder: Path, progress: dict[str, Any]) -> None:
    done = sum(entry["bytes"] for entry in progress["done"].values())
    needed, free = progress["guessed_bytes"] - done, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and about "
            f"{needed / 1e9:.1f} GB are needed; free space or give another output"
        )


def _jobs(
    progress: dict[str, Any], sources: dict[str, Source]
) -> list[shards.ShardJob]:
    """The shards of all splits."""
    jobs = []
    for split, source in sources.items():
        order = np.arange(len(source))
        if shards.file_names(source) is not None:
            order = epoch_order(len(source), _ORDER_SEED, epoch=0)
        count = progress["num_shards"][split]
        for number, indices in enumerate(np.array_split(order, count)):
            file = records.shard_name(split, number, count)
            jobs.append(shards.ShardJob(file, split, source, indices))
    return jobs


def _write_missing(
    folder: Path,
    progress: dict[str, Any],
    sources: dict[str, Source],
    encoding: Encoding,
    on_error: str,
    run: Callable[..., None],
) -> None:
    done = progress["done"]
    for entry in done.values():
        if on_error == "stop" and entry["left_out"]:
            raise UserError(
                f"shard {folder / entry['file']} was written with --on-error skip and "
                f"leaves out {entry['left_out'][0]['name']}; continue with that "
                "option, or delete the shard"
            )
    missing = [job for job in _jobs(progress, sources) if job.file not in done]
    lock = threading.Lock()

    def write(job: shards.ShardJob, tick: Callable[[], None]) -> None:
        entry = shards.write_shard(job, folder, encoding, on_error == "skip", tick)
        with lock:
            done[job.file] = entry
            _write_json(folder / PROGRESS, progress)

    run(write, missing, sum(len(job.indices) for job in missing), "examples")


def _write_json(file: Path, content: Any) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _finish(
    folder: Path,
    progress: dict[str, Any],
    collection: Collection,
    annex: Annex,
    run: Callable[..., None],
) -> dict[str, Any]:
    """Checks all shards, and writes the annex and the manifest."""
    described, settings = collection.description, progress["settings"]
    splits = {}
    for split, count in progress["num_shards"].items():
        entries = [
            dict(progress["done"][records.shard_name(split, number, count)])
            for number in range(count)
        ]
        left_out = [item for entry in entries for item in entry.pop("left_out")]
        splits[split] = {
            "examples": sum(entry["examples"] for entry in entries),
            "bytes": sum(entry["bytes"] for entry in entries),
            "shards": entries,
            "left_out": sorted(left_out, key=lambda item: item["index"]),
        }
        if not splits[split]["examples"]:
            raise UserError(
                f"every image of split {split} is broken; leave it out with --splits"
            )
    _verify(folder, [e for s in splits.values() for e in s["shards"]], run)
    keeps_size = settings["shorter_side"] is None
    manifest = {
        "format": records.FORMAT,
        "version": records.VERSION,
        "created": progress["created"],
        "source": {"given": progress["source"], "version": described.version},
        "channels": described.channels,
        "image_shape": described.image_shape if keeps_size else None,
        "settings": settings,
        "splits": splits,
        "class_names": list(described.class_names),
        **annex.write(folder, splits),
    }
    _write_json(folder / records.MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return json.loads(json.dumps(manifest))


def _verify(
    folder: Path, entries: list[dict[str, Any]], run: Callable[..., None]
) -> None:
    faults: list[str] = []

    def check(entry: dict[str, Any], tick: Callable[[], None]) -> None:
        tick()
        fault = shards.shard_fault(folder, entry)
        if fault is not None:
            faults.append(fault)

    run(check, entries, len(entries), "shards checked")
    if faults:
        others = f" ({len(faults)} shards in all)" if len(faults) > 1 else ""
        raise UserError(
            f"{min(faults)}{others}; delete it, and manifest.json if there is one, and "
            "prepare again"
        )
