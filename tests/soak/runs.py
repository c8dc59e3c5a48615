"""Starts, disturbs, damages and compares the runs of a soak."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax.workdir import Workdir
from tests.conftest import HEED_CTRL_C
from tests.training.helpers import final_state

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.001
LONGEST_SECONDS = 600
OF_THE_CLOCK = ("images_per_second", "input_wait", "seconds")
"""What rows of metrics.jsonl tell of time: the only part that may differ."""


class Failed(Exception):
    """What a run did that it should not, in a sentence."""


class Skipped(Exception):
    """Why a fault cannot be tried here."""


class Process:
    """A started command; its output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]):
        """Starts it."""
        self._log = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [*HEED_CTRL_C, *command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def lives(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition; False where the process ended before."""
        end = time.monotonic() + LONGEST_SECONDS
        while self.lives:
            if condition():
                return True
            if time.monotonic() > end:
                self.popen.kill()
                raise Failed(f"nothing happened in {LONGEST_SECONDS} s")
            time.sleep(POLL_SECONDS)
        return False

    def wait_for(self, seconds: float) -> bool:
        """Waits that long; False where the process ended before."""
        until = time.monotonic() + seconds
        return self.wait_until(lambda: time.monotonic() >= until)

    def ends(self, status: int, seconds: float = LONGEST_SECONDS) -> str:
        """Its output, once it has ended with that exit status and no traceback."""
        try:
            found = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise Failed(f"still running after {seconds:.0f} s") from None
        if "Traceback" in self.output:
            raise Failed(f"a traceback: {tail(self.output)}")
        if found != status:
            raise Failed(f"exit status {found}, not {status}: {tail(self.output)}")
        return self.output

    def kill(self) -> None:
        """Sends SIGKILL and waits."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


class Runs:
    """The runs of one soak: a folder, a command, and how its undisturbed run ended.

    Attributes:
      rng: draws every moment and damage.
    """

    def __init__(self, root: Path, overrides: Sequence[str], seed: int):
        """Names the folder; starts nothing."""
        self.root, self._overrides = root, list(overrides)
        self.seed, self.rng = seed, random.Random(seed)
        self._logs = itertools.count(1)
        (root / "logs").mkdir(parents=True, exist_ok=True)
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        self._environment = dict(
            os.environ,
            PYTHONPATH=str(REPOSITORY),
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES="1",
            JAX_COMPILATION_CACHE_DIR=cache,
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )

    def start(
        self,
        workdir: Path,
        *overrides: str,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Starts the run of a workdir, or goes on with it."""
        command = [
            *(sys.executable, "-m", "resnet_jax", "train"),
            *("--config", "configs/digits.py:cifar_resnet8"),
            *("--workdir", str(workdir), *self._overrides, *overrides),
        ]
        return self.run(command, environment)

    def run(
        self, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> Process:
        """Starts any command with the runs' environment."""
        log = self.root / "logs" / f"{next(self._logs):03}.log"
        return Process(command, log, self._environment | (environment or {}))

    def undisturbed(self, name: str = "undisturbed", *overrides: str) -> Path:
        """The workdir of a run that nothing disturbs, made once."""
        workdir = self.root / name
        if not (workdir / "result.json").exists():
            self.start(workdir, *overrides).ends(0)
        return workdir

    def make_stopped(self) -> None:
        """A run that is killed when it has saved three times."""
        workdir = self.root / "stopped"
        process = self.start(workdir)
        if not process.wait_until(lambda: saves_of(workdir) >= 3):
            raise Failed("the run ended before its third checkpoint")
        process.kill()

    def stopped(self, name: str) -> Path:
        """A copy of that run's workdir."""
        return Path(shutil.copytree(self.root / "stopped", self.root / name))

    def finish(self, workdir: Path) -> str:
        """Goes on to the end, which has to be the undisturbed one; the output."""
        output = self.start(workdir).ends(0)
        same_end(workdir, self.undisturbed())
        return output


def steps_of(workdir: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, increasing."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def unfinished(workdir: Path) -> list[str]:
    """Names of checkpoints whose writing has begun and not ended."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return [name for name in names if ".orbax-checkpoint-tmp" in name]


def saves_of(workdir: Path) -> int:
    """How many times the run has saved so far, by its newest checkpoint."""
    config = Workdir(workdir).read_config()
    newest = steps_of(workdir)[-1:]
    if config is None or not newest or not config.checkpoint.every_steps:
        return 0
    return newest[0] // config.checkpoint.every_steps


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a line that a kill has cut is left out."""
    file = workdir / "metrics.jsonl"
    has_rows = file.exists() and b"\n" in file.read_bytes()
    return Workdir(workdir).read_rows() if has_rows else []


def same_end(workdir: Path, reference: Path) -> None:
    """Raises Failed where a run's end differs in a bit from the undisturbed one's."""
    arrays, content = last_state(workdir)
    expected, _ = last_state(reference)
    if arrays.keys() != expected.keys():
        raise Failed("the state has other parts than the undisturbed run's")
    for name, array in expected.items():
        if array.tobytes() != arrays[name].tobytes():
            raise Failed(f"{name} is not that of the undisturbed run")
    rows = rows_of(workdir)
    if content["rows"] != rows:
        raise Failed("metrics.jsonl is not what the last checkpoint says")
    compare_rows(rows, rows_of(reference))


def compare_rows(
    rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]
) -> None:
    """Raises Failed for doubled, missing or differing rows, or a clock run back."""
    steps = [row["step"] for row in rows]
    if steps != [row["step"] for row in expected]:
        raise Failed(f"metrics.jsonl has steps {steps}")
    for row, other in zip(rows, expected, strict=True):
        for name in sorted((row.keys() | other.keys()) - set(OF_THE_CLOCK)):
            if row.get(name) != other.get(name):
                raise Failed(
                    f"{name} of step {row['step']} is {row.get(name)}, not "
                    f"{other.get(name)}"
                )
    seconds = [row["seconds"] for row in rows]
    if any(after <= before for before, after in itertools.pairwise(seconds)):
        raise Failed("the seconds of metrics.jsonl do not increase")


def last_state(workdir: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of the last checkpoint by their path, and its other content."""
    config = Workdir(workdir).read_config()
    if config is None or not steps_of(workdir):
        raise Failed(f"{workdir.name} holds no checkpoint")
    state, content = final_state(config, workdir)
    return {
        jax.tree_util.keystr(path): np.asarray(words(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }, content


def words(leaf: jax.Array) -> jax.Array:
    """An array, of a random key its words."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def the_error(output: str) -> str:
    """The one sentence of a run that stops for a fault."""
    errors = [line for line in output.split("\n") if line.startswith("resnet-jax: err")]
    if len(errors) != 1:
        raise Failed(f"{len(errors)} sentences of a fault: {tail(output)}")
    return errors[0].removeprefix("resnet-jax: error: ")


def tail(output: str) -> str:
    """The end of an output, on one line."""
    return " | ".join(output.strip().split("\n")[-3:])[-400:]


def without_paths(text: str, root: Path) -> str:
    """A sentence without the folder that the soak happened to have."""
    return re.sub(r"\s+", " ", text.replace(str(root), "SOAK"))


def files_of(folder: Path) -> list[Path]:
    """Its files, the largest first."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda file: (-file.stat().st_size, str(file)))


def truncate(folder: Path, rng: random.Random) -> None:
    """Cuts the arrays' largest file anywhere."""
    file = files_of(folder)[0]
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bit(folder: Path, rng: random.Random) -> None:
    """Flips one bit of that file."""
    flip_bit_of(files_of(folder)[0], rng)


def flip_bit_of(file: Path, rng: random.Random) -> None:
    """Flips one bit of a file that is not empty."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def empty(folder: Path, rng: random.Random) -> None:
    """Leaves all files, with nothing in them."""
    del rng
    for file in files_of(folder):
        file.write_bytes(b"")


def delete_half(folder: Path, rng: random.Random) -> None:
    """Removes the largest file and half of the others."""
    largest, *others = files_of(folder)
    for file in (largest, *rng.sample(others, len(others) // 2)):
        file.unlink()


def cut_json(folder: Path, rng: random.Random) -> None:
    """Cuts the JSON of the run's other content anywhere."""
    file = folder / "meta" / "metadata"
    os.truncate(file, rng.randrange(1, file.stat().st_size))


def change_json(folder: Path, rng: random.Random) -> None:
    """Leaves that JSON well-formed, with another loss in a row."""
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    content = json.loads(meta["content"])
    rng.choice(content["rows"])["train_loss"] += 1
    file.write_text(json.dumps(meta | {"content": json.dumps(content)}))


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    """A file system of that size at ``folder``.

    Raises:
      Skipped: mounting is not allowed here.
    """
    folder.mkdir()
    options = f"size={kibibytes}k"
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise Skipped(f"no small file system can be mounted: {reason}") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def kibibytes_on_disk(folder: Path) -> int:
    """What its files and folders take of a file system with blocks of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*"))
