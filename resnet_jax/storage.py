"""Where the files of a run are: on a disk, or as objects in a store such as gs://.

A disk renames, appends and locks. A store only replaces whole objects, each in one
step. This module holds the differences; pathlib and epath do the rest alike.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from resnet_jax import signals
from resnet_jax.environment import how_to_install
from resnet_jax.errors import UserError

LOCK = "run.lock"
BEAT_SECONDS = 15.0
"""How often a run renews its lock in a store."""
DEAD_SECONDS = 60.0
"""A lock that is not renewed for this long belongs to a dead run."""
SETTLE_SECONDS = 2.0
"""When runs take a lock at once, the one that it names after this time keeps it."""
APPEND_SECONDS = 10.0
"""A growing object is written at most this often: stores limit writes per object."""

Tell = Callable[[str], None]


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of a store."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike[str]) -> Any:
    """The path of a folder or file: an absolute Path, or epath's for a URL.

    Raises:
      UserError: no path can have that name, or the URL's store is unknown.
    """
    if not is_remote(path):
        try:
            return expand(path).resolve()
        except RuntimeError:
            raise UserError(f"{path} is a symbolic link to itself") from None
    try:
        return epath.Path(os.fspath(path))
    except KeyError:
        raise UserError(
            f"{path} names no store that can be read: give a folder on this machine, "
            "or a URL such as gs://BUCKET/FOLDER"
        ) from None


def expand(path: str | os.PathLike[str]) -> Path:
    """A path on this machine, with ``~`` replaced by the home folder.

    Raises:
      UserError: it is empty, contains a NUL character, or names an unknown user's home.
    """
    text = os.fspath(path)
    if not text:
        raise UserError("a path must not be empty; '.' is the current folder")
    if "\0" in text:
        raise UserError(f"a path must not contain a NUL character: {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise UserError(
            f"{text} begins with {user}, but this machine knows no home folder of "
            f"that user; for a folder of that name, give ./{text}"
        ) from None


@contextlib.contextmanager
def reached(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any error of a store into a UserError that it cannot be reached.

    Errors of a disk and missing files pass unchanged.
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
                f"{path} cannot be reached without gcsfs: {how_to_install('gcs')}, or "
                "give a folder on this machine"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be reached: {reason[0]}; check the network, and the "
            "credentials (gcloud auth application-default login)"
        ) from error


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Locks a folder on the disk, or raises UserError with the text ``refusal``.

    The lock ends with the process, however it ends.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(refusal) from None
    finally:
        os.close(opened)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path; the file written there replaces ``path`` in one step.

    If the block fails, ``path`` stays as it was, and the temporary file is deleted.
    """
    # Two processes may write the same file.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    signals.temporary_files.add(temporary)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        signals.temporary_files.discard(temporary)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """``replacing`` for a file that the user named.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with replacing(expand(path)) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def refuse_existing(path: Path, force: bool) -> None:
    """Raises UserError if a file exists that ``force`` does not allow to replace."""
    if path.exists() and not force:
        raise UserError(f"{path} exists; give another path, or --force")


def delete_leftovers(folder: Path) -> None:
    """Deletes the temporary files of ``replacing`` that killed processes left."""
    for leftover in folder.glob(".????????????????.part"):
        leftover.unlink(missing_ok=True)


def storage_of(path: Path) -> "Disk | Store":
    """The storage that holds a path."""
    return Store() if is_remote(path) else Disk()


class Disk:
    """The file system of this machine."""

    def check_writable(self, folder: Path) -> None:
        """Makes the folder; raises OSError if it is not writable."""
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        probe.write_bytes(b"")
        probe.unlink()

    @contextlib.contextmanager
    def lock(self, folder: Path, tell: Tell) -> Iterator[None]:
        """Holds a folder; raises UserError if another run holds it."""
        del tell
        with locked(folder, _in_use(folder)):
            delete_leftovers(folder)
            yield

    def write(self, path: Path, text: str) -> None:
        """Replaces a file in one step."""
        with replacing(path) as temporary:
            temporary.write_text(text)

    def append(self, path: Path, text: str) -> None:
        """Appends to a file."""
        with path.open("a") as file:
            file.write(text)

    def move(self, source: Path, target: Path) -> None:
        """Renames a folder, and deletes an earlier ``target``."""
        if target.exists():
            shutil.rmtree(target)
        source.rename(target)

    @contextlib.contextmanager
    def mirror(self, folder: Path) -> Iterator["Mirror"]:
        """The folder itself; ``Store.mirror`` needs a copy."""
        yield Mirror(folder, None)


class Store:
    """Objects below a URL. All methods raise UserError if it cannot be reached."""

    def __init__(self) -> None:
        self._texts: dict[Path, str] = {}  # of objects that grow
        self._waiting: set[Path] = set()
        self._flushed = float("-inf")
        self._lost_to: str | None = None

    def check_writable(self, folder: Path) -> None:
        """Writes an object and deletes it; a store needs no folders."""
        with reached(folder):
            (folder / ".write_probe").write_text("")
            (folder / ".write_probe").unlink()

    @contextlib.contextmanager
    def lock(self, folder: Path, tell: Tell) -> Iterator[None]:
        """Holds a folder by an object that names the run. A thread renews it.

        A killed run leaves its lock. The next run watches it for ``DEAD_SECONDS`` to
        see whether it is renewed, so clocks need not agree. On leaving, rows that still
        wait are written.

        Raises:
          UserError: another run renews it, or took it at the same time.
        """
        file = folder / LOCK
        me = f"{socket.gethostname()}, process {os.getpid()}, {secrets.token_hex(8)}"
        with reached(folder):
            _wait_until_free(file, tell)
            _renew(file, me)
            time.sleep(SETTLE_SECONDS)
            if (holder := _holder(file)) != me:
                raise UserError(_in_use(folder, holder))
        leaving = threading.Event()

        def beat() -> None:
            while not leaving.wait(BEAT_SECONDS):
                # If the store cannot be reached now, try again at the next beat.
                with contextlib.suppress(Exception):
                    holder = _holder(file)
                    if holder and holder != me:
                        self._lost_to = holder
                        return
                    _renew(file, me)

        thread = threading.Thread(target=beat, name=LOCK, daemon=True)
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join()
            # Errors here must not hide one of the run.
            with contextlib.suppress(Exception):
                self._flush()
            with contextlib.suppress(Exception):
                if _holder(file) == me:
                    file.unlink()

    def write(self, path: Path, text: str) -> None:
        """Replaces an object, which a store does in one step."""
        self._texts.pop(path, None)
        self._waiting.discard(path)
        self._flush()
        self._put(path, text)

    def append(self, path: Path, text: str) -> None:
        """Appends to an object: rewrites it, at most every ``APPEND_SECONDS``."""
        if path not in self._texts:
            self._texts[path] = read_text(path) or ""
        self._texts[path] += text
        self._waiting.add(path)
        if time.monotonic() - self._flushed >= APPEND_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for path in sorted(self._waiting):
            self._put(path, self._texts[path])
        self._waiting.clear()
        self._flushed = time.monotonic()

    def _put(self, path: Path, text: str) -> None:
        if self._lost_to is not None:
            raise UserError(
                f"{path} now belongs to a run on {self._lost_to}: this run could not "
                f"renew its lock for {DEAD_SECONDS:.0f} s and lost it"
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
        """A temporary folder of this machine, copied to the store at the end."""
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
    """A folder on the disk, ``path``, for libraries that only write there."""

    def __init__(self, path: Path, target: Path | None):
        """``target`` gets the copies; None if the folder needs none."""
        self.path, self._target = path, target
        self._sizes: dict[Path, int] = {}

    def copy(self) -> None:
        """Copies the files that have grown since the last call."""
        if self._target is None:
            return
        for file in sorted(self.path.rglob("*")):
            size = file.stat().st_size
            if file.is_file() and self._sizes.get(file) != size:
                with reached(self._target):
                    there = self._target / str(file.relative_to(self.path))
                    there.write_bytes(file.read_bytes())
                self._sizes[file] = size


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file on the disk for reading.

    Raises:
      OSError: it cannot be opened, or is something else, such as a device or a named
        pipe: reading those may block or never end.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return open(opened, "rb")


def read_text(path: Path) -> str | None:
    """The text of a file or object; None if there is none.

    Raises:
      OSError: it cannot be read.
      UnicodeDecodeError: it is not text.
    """
    try:
        with reached(path):
            if is_remote(path):
                return path.read_text("utf-8")
            with open_regular(path) as file:
                return file.read().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _wait_until_free(file: Path, tell: Tell) -> None:
    first = read_text(file)
    if first is None:
        return
    tell(
        f"{file} belongs to a run on {_holder(file)}, which is alive or was killed; "
        f"watching it for {DEAD_SECONDS:.0f} s"
    )
    for _ in range(round(DEAD_SECONDS / BEAT_SECONDS)):
        time.sleep(BEAT_SECONDS)
        if (now := read_text(file)) is None:
            return
        if now != first:
            raise UserError(_in_use(file.parent, _holder(file)))


def _renew(file: Path, me: str) -> None:
    file.write_text(json.dumps({"run": me, "time": time.time()}))


def _holder(file: Path) -> str:
    """The run that a lock names; empty if there is no lock."""
    try:
        return str(json.loads(read_text(file) or '{"run": ""}')["run"])
    except (ValueError, TypeError, KeyError):
        return "an unknown host"


def _in_use(folder: Path, holder: str = "") -> str:
    where = f" on {holder}" if holder else ""
    return (
        f"workdir {folder} is in use by another run{where}; wait for it, or give "
        "another --workdir"
    )
