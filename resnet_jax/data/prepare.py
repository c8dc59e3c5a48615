"""Preparing a data set: shards of ArrayRecord and a manifest that lists them.

Each shard is written under another name, read back, and renamed when the disk has it;
``progress.json`` then lists it. ``manifest.json`` comes last, after all shards were
checked once more. So a run that is killed at any moment goes on with the same command,
and leaves the same bytes as one that was not.

Shards hold the examples in a fixed random order, the same for every run of the command:
sub-splits such as ``train[:90%]`` are then random examples of all classes, and a shard
can be written without the others. Data sets of tfds and prepared ones were shuffled
when they were made; they keep their order, and their sub-splits.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rich.console
from etils import epath

from resnet_jax.data import records, shards
from resnet_jax.data.encoding import Encoding
from resnet_jax.data.sources import Collection, Source, open_path
from resnet_jax.data.sources.folders import FolderSource, Names
from resnet_jax.data.sources.tars import TarCollection, TarSource, find_tars
from resnet_jax.data.workers import in_threads, say
from resnet_jax.errors import UserError, nearest

PROGRESS = "progress.json"
_ORDER_KEY = [2, 0]
"""Key of the order of the examples in the shards."""
_SAMPLE = 64
"""Examples of a split that are encoded to guess its size."""


def prepare(
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
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Writes a data set as shards of ArrayRecord; goes on where it was stopped.

    Args:
      source: a folder of SPLIT/CLASS/IMAGE, of CIFAR's or idx files, or of ImageNet's
        tars; a tar; a prepared data set; or ``tfds:NAME[:VERSION]``.
      output: the folder for the shards, new or left by the same command.
      splits: which to take; None: all.
      data_dir: where tfds data sets are prepared.
      shorter_side: make larger images so small; None: keep all as they are.
      quality: encode all images as JPEG of it, 1 to 100, where that is smaller; None:
        those alone that are made smaller, with 95.
      num_shards: of each split; None: as many as ``shard_mib`` asks for.
      shard_mib: size of a shard in MiB, about.
      threads: shards that are written at once; None: one for each processor.
      on_error: "stop" at a broken image, or "skip" it: leave it out and list it.
      console: where progress is shown.

    Returns:
      The manifest.

    Raises:
      UserError: the source or an image is broken, the folder holds something else or
        the disk is full.
    """
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error is stop or skip, not {on_error!r}")
    _refuse_numbers(shorter_side, quality, num_shards, shard_mib, threads)
    console = console or rich.console.Console()
    folder = _output_folder(source, output)
    collection = open_source(source, data_dir)
    chosen = _chosen_splits(collection, splits)
    encoding = Encoding(shorter_side, quality)
    sources = {split: _opened(collection, split) for split in chosen}
    settings = _settings(collection, sources, encoding, num_shards, shard_mib)
    with _lock(folder):
        finished = _finished(folder, settings)
        if finished is not None:
            say(console, f"{folder} is prepared already; --verify checks it")
            return finished
        progress = _begin(folder, str(source), settings, sources, encoding)
        _refuse_small_disk(folder, progress)
        _write_missing(folder, progress, sources, encoding, on_error, threads, console)
        manifest = _finish(folder, progress, collection, threads, console)
    _summarize(manifest, folder, console)
    return manifest


def verify(
    output: str | os.PathLike[str],
    *,
    threads: int | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Compares every shard of a prepared data set with the manifest's checksums.

    Args:
      output: the folder.
      threads: shards that are read at once; None: one for each processor.
      console: where progress is shown.

    Raises:
      UserError: a shard is missing or damaged; the first is named, and how many.
    """
    folder = Path(output).expanduser()
    manifest = records.read_manifest(epath.Path(folder))
    if manifest is None:
        raise UserError(
            f"{folder} holds no {records.MANIFEST}: it is not what resnet-jax prepare "
            "makes, or not prepared to the end"
        )
    entries = [
        entry for split in manifest["splits"].values() for entry in split["shards"]
    ]
    console = console or rich.console.Console()
    _verify(folder, entries, threads, console)
    examples = sum(entry["examples"] for entry in entries)
    say(console, f"{folder}: all {len(entries)} shards are whole, {examples} examples")


def open_source(source: str | os.PathLike[str], data_dir: str | None) -> Collection:
    """The collection that ``prepare`` is to read.

    Raises:
      UserError: there is none.
    """
    given = os.fspath(source)
    if given.startswith("tfds:"):
        return _open_tfds(given.removeprefix("tfds:"), data_dir)
    path = Path(given).expanduser()
    if not path.exists():
        raise UserError(
            f"source {path} does not exist; give a folder, a tar or "
            "tfds:NAME[:VERSION] with --data-dir"
        )
    tars = find_tars(path)
    if tars and not (path.is_dir() and (path / "train").is_dir()):
        return TarCollection(tars)
    return open_path(path)


def _open_tfds(name: str, data_dir: str | None) -> Collection:
    from resnet_jax.data.sources.tfds import TfdsCollection, find_builder
    from resnet_jax.data.sources.tfrecords import TfRecordCollection

    builder = find_builder(name, data_dir)
    if builder.is_prepared() and builder.info.file_format.value == "tfrecord":
        return TfRecordCollection(builder)
    return TfdsCollection(name, data_dir)


def _refuse_numbers(
    shorter_side: int | None,
    quality: int | None,
    num_shards: int | None,
    shard_mib: int,
    threads: int | None,
) -> None:
    given = {
        "shorter-side": shorter_side,
        "shards": num_shards,
        "shard-mib": shard_mib,
        "threads": threads,
    }
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"quality is a number from 1 to 100, not {quality}")


def _output_folder(
    source: str | os.PathLike[str], output: str | os.PathLike[str]
) -> Path:
    if "://" in os.fspath(output):
        raise UserError(
            f"output {output} is no folder of this machine; prepare into one, and copy "
            "it there"
        )
    folder = Path(output).expanduser().absolute()
    around = Path(source).expanduser().absolute()
    if around == folder or around in folder.parents:
        raise UserError(f"output {folder} lies in the source; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / (".write_probe" + shards.PARTIAL)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written to ({error.strerror}); give another"
        ) from error
    return folder


def _chosen_splits(
    collection: Collection, splits: Sequence[str] | None
) -> tuple[str, ...]:
    known = collection.description.splits
    for split in splits or ():
        if split not in known:
            raise UserError(
                f"{collection.description.name} has no split {split!r}; "
                f"{nearest(split, known)}"
            )
    return tuple(dict.fromkeys(splits)) if splits else known


def _opened(collection: Collection, split: str) -> Source:
    try:
        opened = collection.source(split)
    except UserError as error:
        others = [name for name in collection.description.splits if name != split]
        if not others:
            raise
        raise UserError(
            f"{error} (to leave {split} out: --splits {','.join(others)})"
        ) from error
    if not len(opened):
        raise UserError(f"split {split} has no examples; leave it out with --splits")
    return opened


def _settings(
    collection: Collection,
    sources: dict[str, Source],
    encoding: Encoding,
    num_shards: int | None,
    shard_mib: int,
) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    names = collection.description.class_names
    return {
        "shorter_side": encoding.shorter_side,
        "quality": encoding.quality,
        "encoder": f"OpenCV {cv2.__version__}" if encoding.changes else None,
        "num_shards": num_shards,
        "shard_mib": None if num_shards else shard_mib,
        "class_names_sha256": hashlib.sha256(
            "\n".join(names).encode("utf-8", "surrogateescape")
        ).hexdigest(),
        "splits": {split: _identity(source) for split, source in sources.items()},
    }


def _identity(source: Source) -> dict[str, Any]:
    """What tells whether the source is the one that the work was begun with."""
    names = _names(source)
    return {
        "examples": len(source),
        "order": "of the source" if names is None else "shuffled",
        "names_sha256": None if names is None else names.checksum(),
    }


def _names(source: Source) -> Names | None:
    """The files' names, where a source is a list of files."""
    return source.names if isinstance(source, (FolderSource, TarSource)) else None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes off; it goes with the process, however that ends."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"output {folder} is being prepared by another process; wait for it"
        ) from None
    finally:
        os.close(opened)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    manifest = records.read_manifest(epath.Path(folder))
    if manifest is not None:
        _refuse_other_settings(folder, manifest["settings"], settings)
        (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


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
    """What is done and what is to do: read from the folder, or laid down in it."""
    file = folder / PROGRESS
    for leftover in folder.glob("*" + shards.PARTIAL):
        leftover.unlink()
    if file.exists():
        try:
            progress: dict[str, Any] = json.loads(file.read_text())
            _refuse_other_settings(folder, progress["settings"], settings)
        except (ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged; empty {folder}") from error
        return progress
    others = sorted(entry.name for entry in folder.iterdir())
    if others:
        raise UserError(
            f"output {folder} holds {others[0]}, which resnet-jax prepare did not "
            "make; give a new or an empty folder"
        )
    sizes = {
        split: len(opened) * _mean_size(opened, encoding)
        for split, opened in sources.items()
    }
    counts = {
        split: settings["num_shards"]
        or -(-round(size) // (settings["shard_mib"] * 2**20))
        for split, size in sizes.items()
    }
    progress = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": source,
        "settings": settings,
        "guessed_bytes": round(sum(sizes.values())),
        "num_shards": {
            split: max(1, min(count, len(sources[split])))
            for split, count in counts.items()
        },
        "done": {},
    }
    shards.write_json(file, progress)
    return progress


def _mean_size(source: Source, encoding: Encoding) -> float:
    """Mean size of an encoded example, from some that are spread over the split."""
    chosen = np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int)
    sizes = []
    for index in chosen:
        with contextlib.suppress(UserError):  # is told of when its shard is written
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


def _jobs(progress: dict[str, Any], sources: dict[str, Source]) -> list[shards.Job]:
    """All shards, of all splits."""
    jobs = []
    for split, source in sources.items():
        names = _names(source)
        order = np.arange(len(source))
        if names is not None:
            words = np.random.Philox(key=_ORDER_KEY).random_raw(len(source))
            order = np.argsort(words, kind="stable")
        count = progress["num_shards"][split]
        for number, indices in enumerate(np.array_split(order, count)):
            file = records.shard_name(split, number, count)
            jobs.append(shards.Job(file, split, source, indices, names))
    return jobs


def _write_missing(
    folder: Path,
    progress: dict[str, Any],
    sources: dict[str, Source],
    encoding: Encoding,
    on_error: str,
    threads: int | None,
    console: rich.console.Console,
) -> None:
    jobs = _jobs(progress, sources)
    done = progress["done"]
    for file in [file for file in done if not (folder / file).is_file()]:
        del done[file]
    if on_error == "stop":
        _refuse_left_out(folder, done)
    missing = [job for job in jobs if job.file not in done]
    if done:
        say(console, f"{len(done)} of {len(jobs)} shards are written already")

    def write(job: shards.Job, tick: Callable[[], None]) -> None:
        entry = shards.write(job, folder, encoding, on_error == "skip", tick)
        with lock:
            done[job.file] = entry
            shards.write_json(folder / PROGRESS, progress)

    lock = threading.Lock()
    total = sum(len(job.indices) for job in missing)
    in_threads(write, missing, threads, total, "examples", console)


def _refuse_left_out(folder: Path, done: dict[str, Any]) -> None:
    for entry in done.values():
        if entry["left_out"]:
            raise UserError(
                f"shard {folder / entry['file']} was written with --on-error skip and "
                f"leaves out {entry['left_out'][0]['name']}; go on with that, or "
                "delete the shard"
            )


def _finish(
    folder: Path,
    progress: dict[str, Any],
    collection: Collection,
    threads: int | None,
    console: rich.console.Console,
) -> dict[str, Any]:
    """Checks all shards and writes the manifest."""
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
            raise UserError(f"split {split} has no image that is not broken")
    _verify(folder, [e for s in splits.values() for e in s["shards"]], threads, console)
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
    }
    shards.write_json(folder / records.MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return json.loads(json.dumps(manifest))


def _verify(
    folder: Path,
    entries: list[dict[str, Any]],
    threads: int | None,
    console: rich.console.Console,
) -> None:
    found: list[str] = []

    def check(entry: dict[str, Any], tick: Callable[[], None]) -> None:
        tick()
        fault = shards.check(folder, entry)
        if fault is not None:
            found.append(fault)

    in_threads(check, entries, threads, len(entries), "shards checked", console)
    if found:
        others = f" ({len(found)} shards in all)" if len(found) > 1 else ""
        raise UserError(
            f"{min(found)}{others}; delete it, and manifest.json if there is one, and "
            "prepare again"
        )


def _summarize(
    manifest: dict[str, Any], folder: Path, console: rich.console.Console
) -> None:
    for name, split in manifest["splits"].items():
        line = (
            f"{name}: {split['examples']:,} examples in {len(split['shards'])} shards, "
            f"{split['bytes'] / 1e6:,.1f} MB"
        )
        if split["left_out"]:
            first = split["left_out"][0]
            line += f"; {len(split['left_out'])} left out, such as {first['name']}"
        say(console, line)
    say(console, f"prepared and checked; train on it with data.path={folder}")
