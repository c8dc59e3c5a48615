"""The files of a run: config.json, metrics.jsonl, result.json, report.html.

With several processes only the first writes them. They are in a folder, or below a URL
such as ``gs://bucket/run`` (see ``storage``).

Every file is replaced in one step or grows by whole lines, so that a run killed at any
moment leaves readable files.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from resnet_jax import distributed, storage
from resnet_jax.config import Config, Derived, DetectionConfig, fields, flatten, resolve
from resnet_jax.errors import UserError
from resnet_jax.identity import Identity
from resnet_jax.run_files import (
    ANY_RESULT,
    CONFIG,
    DETECTION_RESULT,
    DETECTION_ROW,
    IDENTITY,
    NUMBER,
    RESTORE,
    ROW,
    check,
    check_result,
    parse,
)


class Workdir:
    """A run's folder.

    Attributes:
      path: absolute, or an epath URL.
      checkpoints, tensorboard, profile, report: paths in it.
    """

    def __init__(self, path: str | os.PathLike[str], schema: Any = Config):
        """Names the folder of a run whose config has this schema; touches nothing."""
        self._schema = schema
        self._detects = schema is DetectionConfig
        self.path: Path = storage.locate(path)
        self._storage = storage.storage_of(self.path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.report = self.path / "report.html"
        self._metrics = self.path / "metrics.jsonl"

    def create(self) -> None:
        """Creates the folder; raises UserError if it cannot be written to."""
        if not distributed.is_primary():
            return
        try:
            self._storage.check_writable(self.path)
        except OSError as error:
            raise UserError(
                f"workdir {self.path} cannot be written to ({error.strerror}); "
                "give another --workdir"
            ) from error

    @contextlib.contextmanager
    def created(self) -> Iterator[None]:
        """Creates the folder; if the start fails, a new one is deleted again.

        A folder with a row, a checkpoint or a failure stays. A store has no folders.
        """
        folders = (
            [] if storage.is_remote(self.path) else [self.path, *self.path.parents]
        )
        new = [folder for folder in folders if not folder.exists()]
        self.create()
        try:
            yield
        except Exception:
            if new and distributed.is_primary() and not self._holds_work():
                shutil.rmtree(self.path)
                with contextlib.suppress(OSError):  # something else is in them by now
                    for folder in new[1:]:
                        folder.rmdir()
            raise

    def _holds_work(self) -> bool:
        """Whether a run in the folder has left more than a start does."""
        rows = self.path.glob(f"**/{self._metrics.name}")
        return (
            any(file.stat().st_size for file in rows)
            or any(self.path.glob("**/checkpoints/*"))
            or any(self.path.glob("**/failure.json"))
        )

    def lock(self, tell: storage.Tell) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out; raises UserError if another run holds the folder.

        On a disk the lock ends with the process, however it ends. In a store it is an
        object, and ``tell`` reports one that a killed run may have left.
        """
        if distributed.is_primary():
            return self._storage.lock(self.path, tell)
        return contextlib.nullcontext()

    def mirror(self, folder: Path) -> contextlib.AbstractContextManager[storage.Mirror]:
        """``folder`` on this host's disk, for libraries that only write to disks."""
        return self._storage.mirror(folder)

    @contextlib.contextmanager
    def compiled_programs(self, folder: str | None) -> Iterator[None]:
        """Keeps compiled programs in a folder, so that a restart does not compile.

        A cache that the process already uses, such as JAX_COMPILATION_CACHE_DIR, stays.

        Args:
          folder: relative to the workdir, or a URL; None means no cache.
        """
        if folder is None or jax.config.values["jax_compilation_cache_dir"]:
            yield
            return
        remote = storage.is_remote(folder)
        path = storage.locate(folder) if remote else self.path / folder
        try:
            # jax decides once, at its first compilation, whether there is a cache.
            jax.config.update("jax_compilation_cache_dir", str(path))
            compilation_cache.reset_cache()
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()

    def check_shared(self) -> None:
        """Raises UserError if the processes of a run see different folders."""
        if distributed.process_count() == 1:
            return
        number = distributed.broadcast(secrets.randbits(31))
        mark = self.path / f".shared-{number}"
        if distributed.is_primary():
            mark.write_bytes(b"")
        distributed.wait_for_all("mark")
        if not mark.exists():
            raise UserError(
                f"workdir {self.path} of process {jax.process_index()} is not the "
                "folder of process 0; give a --workdir that all hosts share"
            )
        distributed.wait_for_all("marks")
        if distributed.is_primary():
            mark.unlink()

    def read_config(self) -> Any:
        """The config of the run that is here, or None."""
        saved = self.read_json("config.json", CONFIG)
        if saved is None:
            return None
        try:
            return resolve(saved["config"], self._schema)
        except UserError as error:
            raise UserError(f"{self.path / 'config.json'}: {error}") from error

    def write_config(
        self,
        config: Any,
        command: str,
        derived: Derived | None = None,
        data: Identity | None = None,
    ) -> None:
        """Writes config.json; the folder of several seeds has only a config."""
        content = {
            "config": dataclasses.asdict(config),
            "derived": derived and dataclasses.asdict(derived),
            "data": data and dataclasses.asdict(data),
            "command": command,
        }
        self.write_json("config.json", content)

    def admit(self, config: Any) -> bool:
        """Whether the config makes the run in the folder longer.

        A run may become longer if its learning rates stay the same.

        Raises:
          UserError: the folder holds a run that would have another result.
        """
        if not distributed.is_primary():
            return False
        present = self.read_config()
        if present is None:
            if self.checkpoints.exists() and any(self.checkpoints.iterdir()):
                raise UserError(
                    f"workdir {self.path} holds checkpoints but no config.json; give "
                    "another --workdir"
                )
            return False
        if (present.seeds > 1) != (config.seeds > 1):
            several = f"runs of {present.seeds} seeds"
            held = several if present.seeds > 1 else "a single run"
            raise UserError(
                f"workdir {self.path} holds {held}, but the config says "
                f"seeds={config.seeds}; give another --workdir"
            )
        here, wanted = flatten(present), flatten(config)
        other = [
            name
            for name, field in fields(self._schema).items()
            if here[name] != wanted[name] and not field.operational
        ]
        if not other:
            return False
        name = other[0]
        run = f"workdir {self.path} holds a run with {name}={here[name]}"
        if other != [name] or name not in ("training.steps", "training.epochs"):
            raise UserError(
                f"{run}, not {wanted[name]}; give another --workdir, or that value to "
                "continue"
            )
        if None in (here[name], wanted[name]) or wanted[name] < here[name]:
            raise UserError(
                f"{run}, not {wanted[name]}, and a run can only become longer; give "
                "another --workdir, or that value to continue"
            )
        if config.schedule.kind in ("cosine", "polynomial"):
            raise UserError(
                f"{run}, and schedule.kind={config.schedule.kind} spreads its learning "
                "rates over that length, so that it cannot become longer; give another "
                "--workdir, or that value"
            )
        return True

    def read_data(self) -> Identity | None:
        """The data of the run that is here; None if config.json does not say."""
        saved = (self.read_json("config.json", CONFIG) or {}).get("data")
        if saved is None:
            return None
        check(f"data in {self.path / 'config.json'}", saved, IDENTITY)
        return Identity.from_json(saved)

    def refuse_other_data(self, found: Identity, trained_on: Identity | None) -> None:
        """Raises UserError if ``found`` differs from the data of an earlier start."""
        difference = trained_on and trained_on.difference(found)
        if difference is not None:
            raise UserError(
                f"workdir {self.path} holds a run on other data: {difference}; give "
                "the run's data, or another --workdir"
            )

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl with these rows."""
        self.write(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl; raises UserError if the disk is full."""
        if distributed.is_primary():
            with _writing(self._metrics):
                self._storage.append(self._metrics, json.dumps(row) + "\n")

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last line that a kill cut short."""
        text = self._read(self._metrics) or ""
        rows = []
        for number, line in enumerate(text.split("\n")[:-1], 1):
            if line.strip():
                where = f"{self._metrics}, line {number}"
                rows.append(parse(where, line, DETECTION_ROW if self._detects else ROW))
                check(where, rows[-1], dict.fromkeys(rows[-1], NUMBER))
        if not rows:
            raise UserError(f"{self._metrics} holds no row; {RESTORE}")
        return rows

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json, which marks the run as finished."""
        self.write_json("result.json", result)

    def remove_result(self) -> None:
        """Deletes result.json: the run is to continue."""
        if distributed.is_primary():
            (self.path / "result.json").unlink(missing_ok=True)

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        expected = DETECTION_RESULT if self._detects else ANY_RESULT
        result = self.read_json("result.json", expected)
        if result is None or self._detects:
            return result
        check_result(str(self.path / "result.json"), result)
        return result

    def write_failure(self, sentence: str) -> None:
        """Writes failure.json, which says how the run diverged."""
        self.create()
        self.write_json("failure.json", {"failure": sentence})

    def read_failure(self) -> str | None:
        """How the run diverged, or None."""
        content = self.read_json("failure.json", {"failure": "a text"})
        return None if content is None else content["failure"]

    def write(self, path: Path, text: str) -> None:
        """Replaces a file in one step: a reader sees the old or the new one, whole.

        Raises:
          UserError: it cannot be written, to a full disk for example.
        """
        if distributed.is_primary():
            with _writing(path):
                self._storage.write(path, text)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file of the workdir."""
        self.write(self.path / name, json.dumps(content, indent=2) + "\n")

    def read_json(
        self, name: str, expected: Mapping[str, str]
    ) -> dict[str, Any] | None:
        """A JSON file of the workdir, checked as ``run_files.check`` does; or None."""
        path = self.path / name
        text = self._read(path)
        return None if text is None else parse(str(path), text, expected)

    def _read(self, path: Path) -> str | None:
        try:
            return storage.read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{path} cannot be read: {reason}; {RESTORE}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, and the same "
            "command continues from the last checkpoint"
        ) from error
