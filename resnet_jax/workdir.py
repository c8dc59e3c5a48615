"""The files of a run: config.json, metrics.jsonl, result.json, report.html.

Of several processes only the first writes them.

Every file is replaced in one step or grows by whole lines, so that a run killed at any
moment leaves files that can be read.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from resnet_jax import distributed
from resnet_jax.config import Config, Derived, fields, flatten, resolve
from resnet_jax.errors import UserError


class Workdir:
    """A run's folder.

    Attributes:
      path: absolute.
      checkpoints, tensorboard, profile, report: paths in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Names the folder; touches nothing."""
        self.path = Path(path).expanduser().resolve()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.report = self.path / "report.html"
        self._config = self.path / "config.json"
        self._metrics = self.path / "metrics.jsonl"
        self._result = self.path / "result.json"

    def prepare(self) -> None:
        """Makes the folder, or raises UserError where it cannot be written to."""
        if not distributed.is_primary():
            return
        probe = self.path / ".write_probe"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"workdir {self.path} cannot be written to ({error.strerror}); "
                "give another --workdir"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other runs off; the lock goes with the process, however it ends.

        Raises:
          UserError: another run has it.
        """
        if not distributed.is_primary():
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(
                f"workdir {self.path} is in use by another run; wait for it, or give "
                "another --workdir"
            ) from None
        finally:
            os.close(folder)

    def check_shared(self) -> None:
        """Raises UserError where the processes of a run see different folders."""
        if distributed.process_count() == 1:
            return
        number = distributed.broadcast(secrets.randbits(31))
        mark = self.path / f".shared-{number}"
        if distributed.is_primary():
            mark.touch()
        distributed.wait_for_all("mark")
        if not mark.exists():
            raise UserError(
                f"workdir {self.path} of process {jax.process_index()} is not that of "
                "process 0; give a --workdir that all hosts share"
            )
        distributed.wait_for_all("marks")
        if distributed.is_primary():
            mark.unlink()

    def read_config(self) -> Config | None:
        """The config of the run that is here, or None.

        Raises:
          UserError: config.json is damaged.
        """
        saved = self._read_json(self._config)
        return None if saved is None else resolve(saved["config"])

    def write_config(self, config: Config, derived: Derived, command: str) -> None:
        """Writes config.json: the resolved config, derived values and the command."""
        content = {
            "config": dataclasses.asdict(config),
            "derived": dataclasses.asdict(derived),
            "command": command,
        }
        write_whole(self._config, json.dumps(content, indent=2) + "\n")

    def refuse_other_run(self, config: Config) -> None:
        """Raises UserError where the folder holds a run that differs in its result."""
        if not distributed.is_primary():
            return
        present = self.read_config()
        if present is None:
            if self.checkpoints.exists() and any(self.checkpoints.iterdir()):
                raise UserError(
                    f"workdir {self.path} holds checkpoints and no config.json: it is "
                    "not a whole run; give another --workdir"
                )
            return
        here, wanted = flatten(present), flatten(config)
        for name, field in fields().items():
            if here[name] != wanted[name] and not field.operational:
                raise UserError(
                    f"workdir {self.path} holds a run with {name}={here[name]}, not "
                    f"{wanted[name]}; give another --workdir, or that value to go on"
                )

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by these rows."""
        write_whole(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl.

        Raises:
          UserError: it cannot be written, to a full disk for example.
        """
        if distributed.is_primary():
            with _writing(self._metrics), self._metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json, which says that the run is finished."""
        write_whole(self._result, json.dumps(result, indent=2) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        return self._read_json(self._result)

    def _read_json(self, path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); restore it or give another --workdir"
            ) from error


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old or the new one, whole.

    Only the first of several processes does.

    Raises:
      UserError: it cannot be written, to a full disk for example.
    """
    if not distributed.is_primary():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with _writing(path):
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, and the same "
            "command goes on from the last checkpoint"
        ) from error
