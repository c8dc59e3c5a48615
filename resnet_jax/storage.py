"""Where the files of a run lie: on a disk, or as objects in a store such as gs://.

A disk renames, appends and locks. A store has none of these: it replaces whole objects,
each in one step. What the two do differently is here; whatever else they do, pathlib's
and epath's paths do alike.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from resnet_jax.errors import UserError

LOCK = "run.lock"
BEAT_SECONDS = 15.0
"""How often a run renews its lock in a store."""
DEAD_SECONDS = 60.0
"""A lock that nobody renews for so long is that of a dead run."""
SETTLE_SECONDS = 2.0
"""Of runs that take a lock at once, the one it names after this time has it."""
APPEND_SECONDS = 10.0
"""A growing object is written at most so often: stores limit writes of one object."""

Tell = Callable[[str], None]


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of a store."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike[str]) -> Any:
    """The path of a folder or file: a Path, absolute, or epath's for a URL.

    Raises:
      UserError: it is the URL of a store that is not known.
    """
    if not is_remote(path):
        return Path(path).expanduser().resolve()
    try:
        return epath.Path(os.fspath(path))
    except KeyError:
        raise UserError(
            f"{path} is in no store that can be used; expected a folder, or "
            "gs://BUCKET/FOLDER"
        ) from None


@contextlib.contextmanager
def reached(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one sentence that a store cannot be reached.

    Each way to reach one has errors of its own. Those of a disk, and of a file that is
    not there, pass as they are.
    """
    try:
        yield
    except (UserError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        if isinstance(error, ImportError):
            raise UserError(
                f"{path} cannot be reached without gcsfs: "
                "pip install 'resnet_jax[gcs]', or give a folder of this machine"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be reached: {reason[0]}; it needs the network, and "
            "credentials that may use it (gcloud auth application-default login)"
        ) from error


def storage_of(path: Path) -> "Disk | Store":
    """What keeps the files below a path."""
    return Store() if is_remote(path) else Disk()


class Disk:
    """The file system of this machine."""

    def check_writable(self, folder: Path) -> None:
        """Makes the folder; raises OSError where it cannot be written to."""
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        probe.write_bytes(b"")
        probe.unlink()

    @contextlib.contextmanager
    def lock(self, folder: Path, tell: Tell) -> Iterator[None]:
        """Holds a folder; the lock goes with the process, however it ends."""
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(
                f"workdir {folder} is in use by another run; wait for it, or give "
                "another --workdir"
            ) from None
        finally:
            os.close(opened)

    def write(self, path: Path, text: str) -> None:
        """Replaces a file in one step, and not before the new one is on the disk."""
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def append(self, path: Path, text: str) -> None:
        """Lets a file grow."""
        with path.open("a") as file:
            file.write(text)

    def move(self, source: Path, target: Path) -> None:
        """Renames a folder; what was at ``target`` is deleted."""
        if target.exists():
            shutil.rmtree(target)
        source.rename(target)

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator["Mirror"]:
        """A folder for those that write to disks alone: the folder itself."""
        yield Mirror(folder, None)


class Store:
    """Objects below a URL, through epath. All raise UserError if it is out of reach."""

    def __init__(self) -> None:
        self._grown: dict[Path, str] = {}
        self._waiting: set[Path] = set()
        self._flushed = float("-inf")
        self._robber: str | None = None

    def check_writable(self, folder: Path) -> None:
        """Writes an object and deletes it; a store needs no folders."""
        probe = folder / ".write_probe"
        with reached(folder):
            probe.write_text("")
            probe.unlink()

    @contextlib.contextmanager
    def lock(self, folder: Path, tell: Tell) -> Iterator[None]:
        """Holds a folder by an object that names the run and is renewed as it lives.

        It is advisory, and what a killed run leaves holds others up for
        ``DEAD_SECONDS``: they watch whether it is renewed, so that no two clocks have
        to agree. Rows that still wait are written on leaving.

        Raises:
          UserError: another run renews it, or took it at the same time.
        """
        file = folder / LOCK
        me = {
            "run": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with reached(folder):
            self._wait_until_free(file, tell)
            _renew(file, me)
            time.sleep(SETTLE_SECONDS)
            holder = _holder(file)
        if holder.get("run") != me["run"]:
            raise _in_use(file, holder)
        leaving = threading.Event()
        beat = threading.Thread(
            target=self._beat, args=(file, me, leaving), name="run.lock", daemon=True
        )
        beat.start()
        try:
            yield
        finally:
            leaving.set()
            beat.join()
            # The run has ended, well or not: what it says is the news, not this.
            with contextlib.suppress(Exception):
                self._flush()
            with contextlib.suppress(Exception):
                if _holder(file).get("run") == me["run"]:
                    file.unlink()

    def _wait_until_free(self, file: Path, tell: Tell) -> None:
        first = _holder(file)
        if not first:
            return
        tell(
            f"{file} is of a run on {first.get('host')} that is alive or was killed; "
            f"watching it for {DEAD_SECONDS:.0f} s"
        )
        end = time.monotonic() + DEAD_SECONDS
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, BEAT_SECONDS / 3))
            now = _holder(file)
            if not now:
                return
            if now != first:
                raise _in_use(file, now)

    def _beat(self, file: Path, me: dict[str, Any], leaving: threading.Event) -> None:
        while not leaving.wait(BEAT_SECONDS):
            # Out of reach for a while: the next time may do.
            with contextlib.suppress(Exception):
                holder = _holder(file)
                if holder and holder.get("run") != me["run"]:
                    self._robber = str(holder.get("host"))
                    return
                _renew(file, me)

    def write(self, path: Path, text: str) -> None:
        """Replaces an object, which a store does in one step."""
        self._grown.pop(path, None)
        self._waiting.discard(path)
        self._flush()
        self._put(path, text)

    def append(self, path: Path, text: str) -> None:
        """Lets an object grow: it is written anew, at most each ``APPEND_SECONDS``."""
        if path not in self._grown:
            self._grown[path] = read_text(path) or ""
        self._grown[path] += text
        self._waiting.add(path)
        if time.monotonic() - self._flushed >= APPEND_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for path in sorted(self._waiting):
            self._put(path, self._grown[path])
        self._waiting.clear()
        self._flushed = time.monotonic()

    def _put(self, path: Path, text: str) -> None:
        if self._robber is not None:
            raise UserError(
                f"{path} is now written by a run on {self._robber}: this one was "
                f"silent for more than {DEAD_SECONDS:.0f} s and lost its lock"
            )
        with reached(path):
            path.write_text(text)

    def move(self, source: Path, target: Path) -> None:
        """Moves all objects below ``source``, one after another."""
        remote: Any = target
        with reached(source):
            if target.exists():
                remote.rmtree()
            source.rename(target)

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator["Mirror"]:
        """A folder of this machine, copied to the store on leaving it, too."""
        with tempfile.TemporaryDirectory(prefix="resnet_jax-") as local:
            mirror = Mirror(Path(local), folder)
            try:
                yield mirror
            except BaseException:
                with contextlib.suppress(Exception):
                    mirror.copy()
                raise
            mirror.copy()


class Mirror:
    """A folder on the disk and, where the files belong in a store, their place there.

    Attributes:
      path: of the folder on the disk.
    """

    def __init__(self, path: Path, target: Path | None):
        self.path, self._target = path, target
        self._sizes: dict[Path, int] = {}

    def copy(self) -> None:
        """Copies the files that have grown; nothing where they lie right already."""
        if self._target is None:
            return
        for file in sorted(self.path.rglob("*")):
            size = file.stat().st_size
            if file.is_file() and self._sizes.get(file) != size:
                with reached(self._target):
                    there = self._target / str(file.relative_to(self.path))
                    there.write_bytes(file.read_bytes())
                self._sizes[file] = size


def read_text(path: Path) -> str | None:
    """The text of a file or object, or None where there is none."""
    try:
        with reached(path):
            return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _holder(file: Path) -> dict[str, Any]:
    """What a lock says; {} where there is none."""
    try:
        return json.loads(read_text(file) or "{}")
    except ValueError:
        return {"host": "unknown"}


def _renew(file: Path, me: dict[str, Any]) -> None:
    file.write_text(json.dumps(me | {"time": time.time()}))


def _in_use(file: Path, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"workdir {file.parent} is in use by another run on {holder.get('host')}, "
        f"process {holder.get('pid')}; wait for it, or give another --workdir"
    )
