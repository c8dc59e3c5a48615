"""The scenarios of a soak: each disturbs runs, and compares how they end."""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.conftest import write_image_folder
from tests.soak import runs
from tests.soak.runs import Failed, Process, Runs

PEER_TIMEOUT_SECONDS = 10
SECOND_SIGNAL_SECONDS = 0.35
LATEST_SECONDS = 0.05
"""Drawn up to this after a save's begin or end, so that kills hit all parts of it."""

SHORT_JUMP = 120  # seconds off; two looks then differ by less than Orbax waits
LONG_JUMP = 1_000_000
RESTLESS_CLOCK = """
import random, time
real, jumps = time.time, random.Random(0)
time.time = lambda: real() + jumps.uniform(-SECONDS, SECONDS)
"""
LEAPING_CLOCK = """
import itertools, time
real, looks = time.time, itertools.count()
time.time = lambda: real() + SECONDS * (next(looks) > MOMENT)
"""

HOSTS = """
import sys
from resnet_jax.config import default_config

def get_config(folder):
    # Each host has a copy of the data of its own.
    flag = next(word for word in sys.argv if word.startswith("--process-id="))
    config = default_config()
    config.model.name = "cifar_resnet8"
    config.data.path = f"{folder}/host{flag.partition('=')[2]}"
    config.data.image_size = 8
    config.data.normalization = "none"
    config.data.resident = False
    config.augmentation.crop_area = (0.3, 1.0)
    config.training.steps = 40
    config.training.global_batch_size = 8
    config.training.log_every_steps = 1
    config.checkpoint.every_steps = 4
    config.evaluation.every_steps = 10
    config.parallel.peer_timeout_seconds = TIMEOUT
    return config
"""


class Soak(Runs):
    """The options and measured times that scenarios share."""

    def __init__(self, options: argparse.Namespace):
        """Names the folder; starts nothing."""
        super().__init__(options.workdir.resolve(), small_run(options), options.seed)
        self.options = options
        self.silent_seconds = self.seconds = 0.0

    def measure(self) -> None:
        """How long a run takes until it first prints, and in all, nothing compiled."""
        process, start = self.start(self.root / "measured"), time.monotonic()
        has_printed(process)
        self.silent_seconds = time.monotonic() - start
        process.ends(0)
        self.seconds = time.monotonic() - start


def has_printed(process: Process) -> bool:
    """Waits for a first line, when a run hears signals; False where it ended before."""
    return process.wait_until(lambda: bool(process.output))


def small_run(options: argparse.Namespace) -> list[str]:
    """Overrides: frequent rows, evaluations and checkpoints."""
    data = options.data_dir or options.workdir.resolve() / "data"
    return [
        f"--config.data.data_dir={data}",
        f"--config.training.steps={options.steps}",
        "--config.training.global_batch_size=32",
        "--config.training.log_every_steps=1",
        "--config.evaluation.every_steps=5",
        "--config.checkpoint.every_steps=4",
        "--config.optimizer.ema_decay=0.9",
    ]


Scenario = Callable[[Soak], Iterator[str]]
"""Yields what was seen in each try that passed; raises Failed or Skipped."""


def undisturbed(soak: Soak) -> Iterator[str]:
    """Two undisturbed runs; without their agreement all else would say nothing."""
    runs.same_end(soak.root / "measured", soak.undisturbed())
    yield f"{soak.seconds:.1f} s each, of which {soak.silent_seconds:.1f} s to start"


def kills(soak: Soak) -> Iterator[str]:
    """SIGKILL at any moment, as a save begins, and as one ends."""
    moments = [at_random, as_a_save_begins, as_a_save_ends]
    workdir, count = soak.root / "kills-0", 0
    while count < soak.options.kills:
        process = soak.start(workdir)
        when = moments[count % len(moments)](soak, process, workdir)
        if when is None:
            process.ends(0)
            runs.same_end(workdir, soak.undisturbed())
            workdir = soak.root / f"kills-{count}"
            continue
        process.kill()
        count += 1
        left = f"{when}: left {runs.steps_of(workdir)}"
        begun = runs.unfinished(workdir)
        yield left + (f" and {', '.join(begun)}" if begun else "")
    soak.finish(workdir)


def at_random(soak: Soak, process: Process, _: Path) -> str | None:
    """Waits for a moment of the whole run; None where it has ended before."""
    moment = soak.rng.uniform(0, soak.seconds)
    return f"after {moment:.2f} s" if process.wait_for(moment) else None


def as_a_save_begins(soak: Soak, process: Process, workdir: Path) -> str | None:
    """Waits for a folder that is being written, and a little."""
    saves, later = soak.rng.randint(1, 3), soak.rng.uniform(0, LATEST_SECONDS)
    seen = set(runs.unfinished(workdir))

    def new() -> bool:
        seen.update(runs.unfinished(workdir))
        return len(seen) >= already + saves

    already = len(seen)
    if not process.wait_until(new) or not process.wait_for(later):
        return None
    return f"{1000 * later:.0f} ms after a save began"


def as_a_save_ends(soak: Soak, process: Process, workdir: Path) -> str | None:
    """Waits for checkpoints with their final name, and a little."""
    saves, later = soak.rng.randint(1, 3), soak.rng.uniform(0, LATEST_SECONDS)
    wanted = saves * 4 + max(runs.steps_of(workdir), default=0)
    if not process.wait_until(
        lambda: max(runs.steps_of(workdir), default=0) >= wanted
    ) or not process.wait_for(later):
        return None
    return f"{1000 * later:.0f} ms after a save ended"


def disk_full(soak: Soak) -> Iterator[str]:
    """A file system that has room for one or two checkpoints, and then for more."""
    last = soak.undisturbed() / "checkpoints" / str(soak.options.steps)
    size = runs.kibibytes_on_disk(last)
    for number in range(soak.options.tries):
        free = int(size * soak.rng.uniform(1.7, 2.9))
        disk = soak.root / f"disk-{number}"
        with runs.small_disk(disk, kibibytes=20 * size):
            ballast, workdir = disk / "ballast", disk / "run"
            ballast.write_bytes(bytes(1024 * (20 * size - free)))
            sentence = runs.the_error(soak.start(workdir).ends(1))
            kept = runs.steps_of(workdir)
            if "make room, and the same command" not in sentence or not kept:
                raise Failed(f"it kept {kept} and said: {sentence}")
            runs.last_state(shutil.copytree(workdir, soak.root / f"kept-{number}"))
            again = runs.the_error(soak.start(workdir).ends(1))
            ballast.unlink()
            soak.finish(workdir)
        yield f"{free} KiB for checkpoints of {size}: kept {kept}; {sentence}; {again}"


def damaged(soak: Soak) -> Iterator[str]:
    """The newest checkpoint damaged in every way, where it must be named."""
    kinds = [
        runs.truncate,
        runs.flip_bit,
        runs.empty,
        runs.delete_half,
        runs.cut_json,
        runs.change_json,
    ]
    for kind in kinds:
        workdir = soak.stopped(f"damaged-{kind.__name__}")
        *_, before, newest = runs.steps_of(workdir)
        kind(workdir / "checkpoints" / str(newest), soak.rng)
        output = " ".join(soak.finish(workdir).split())
        for sentence in (
            f"checkpoints/{newest} is damaged",
            f"continuing from the checkpoint at step {before}",
        ):
            if sentence not in output:
                raise Failed(f"{kind.__name__}: it never said: {sentence}")
        yield f"{kind.__name__}: {newest} named, on from {before}"


def bit_anywhere(soak: Soak) -> Iterator[str]:
    """A bit of any file of the newest checkpoint: harmless, or named."""
    for number in range(soak.options.tries):
        workdir = soak.stopped(f"bit-{number}")
        newest = workdir / "checkpoints" / str(runs.steps_of(workdir)[-1])
        files = [file for file in runs.files_of(newest) if file.stat().st_size]
        file = soak.rng.choice(files)
        runs.flip_bit_of(file, soak.rng)
        named = "is damaged" in " ".join(soak.finish(workdir).split())
        yield f"{file.parent.name}/{file.name}: {'named' if named else 'harmless'}"


def two_runs(soak: Soak) -> Iterator[str]:
    """A second run in one workdir, while the first one's process is held still."""
    workdir = soak.root / "two"
    first = soak.start(workdir)
    if not first.wait_until(lambda: bool(runs.rows_of(workdir))):
        raise Failed("the first run ended too early")
    first.popen.send_signal(signal.SIGSTOP)
    try:
        sentence = runs.the_error(soak.start(workdir).ends(1))
    finally:
        first.popen.send_signal(signal.SIGCONT)
    if "in use by another run" not in sentence:
        raise Failed(f"the second run said: {sentence}")
    first.ends(0)
    runs.same_end(workdir, soak.undisturbed())
    yield sentence


def clock(soak: Soak) -> Iterator[str]:
    """A wall clock that jumps, from a killed run on.

    Orbax gives parts of a save five minutes by that clock: a longer jump in a save may
    stop the run, in one sentence, and the same command goes on.
    """
    patch = RESTLESS_CLOCK.replace("SECONDS", str(SHORT_JUMP))
    process, workdir = with_clock(soak, "clock-restless", patch)
    seen = end_of_jumps(soak, process, workdir, may_stop=False)
    yield f"time.time patched, each call up to {SHORT_JUMP} s off: {seen}"
    for number in range(soak.options.tries):
        # Orbax looks at the clock some dozens of times a save, the run seldom.
        look = soak.rng.randint(50, 500)
        patch = LEAPING_CLOCK.replace("SECONDS", str(LONG_JUMP))
        patch = patch.replace("MOMENT", str(look))
        process, workdir = with_clock(soak, f"clock-leaping-{number}", patch)
        seen = end_of_jumps(soak, process, workdir, may_stop=True)
        yield f"time.time {LONG_JUMP} s further from look {look} on: {seen}"


def with_clock(soak: Soak, name: str, patch: str) -> tuple[Process, Path]:
    """A stopped run that goes on with a patched clock."""
    folder = soak.root / name
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(patch)
    path = f"{folder}{os.pathsep}{runs.REPOSITORY}"
    workdir = soak.stopped(f"{name}-run")
    return soak.start(workdir, environment={"PYTHONPATH": path}), workdir


def end_of_jumps(soak: Soak, process: Process, workdir: Path, may_stop: bool) -> str:
    """How a run with a jumping clock ended; it goes on without jumps if it stopped."""
    process.popen.wait()
    if process.popen.returncode == 0 or not may_stop:
        process.ends(0)
        runs.same_end(workdir, soak.undisturbed())
        return "same end"
    sentence = runs.the_error(process.ends(1))
    soak.finish(workdir)
    return f"{sentence}; then the same end"


def cut_metrics(soak: Soak) -> Iterator[str]:
    """metrics.jsonl cut anywhere in a line between two starts."""
    for number in range(soak.options.tries):
        workdir = soak.stopped(f"metrics-{number}")
        file = workdir / "metrics.jsonl"
        data = file.read_bytes()
        place = soak.rng.randrange(1, len(data) - 1)
        while data[place - 1 : place] == b"\n":
            place += 1
        file.write_bytes(data[:place])
        soak.finish(workdir)
        yield f"cut at byte {place} of {len(data)}"


def broken_host(soak: Soak) -> Iterator[str]:
    """Two processes, of which the second one's own copy of the images is broken."""
    folder, (reference, workdir) = soak.root / "hosts", ("hosts-whole", "hosts-broken")
    write_image_folder(folder / "host0", {"train": 24, "test": 4}, shape=(9, 12))
    shutil.copytree(folder / "host0", folder / "host1")
    file = soak.root / "hosts.py"
    file.write_text(HOSTS.replace("TIMEOUT", str(PEER_TIMEOUT_SECONDS)))

    def start(name: str) -> Process:
        launcher = [sys.executable, "launch/launch.py", "local", "--processes=2", "--"]
        train = ["train", f"--config={file}:{folder}", f"--workdir={soak.root / name}"]
        return soak.run([*launcher, *train])

    start(reference).ends(0)
    process = start(workdir)
    process.wait_until(lambda: bool(runs.steps_of(soak.root / workdir)))
    process.popen.send_signal(signal.SIGTERM)
    process.ends(0)
    kept = runs.steps_of(soak.root / workdir)
    for image in (folder / "host1" / "train" / "bee").iterdir():
        image.write_bytes(b"no image")
    process = start(workdir)
    process.wait_until(lambda: "cannot be decoded" in process.output)
    met = time.monotonic()
    output = process.ends(1, seconds=PEER_TIMEOUT_SECONDS)
    seconds = time.monotonic() - met
    if "process 1 of 2 has stopped" not in output or not kept:
        raise Failed(f"process 1 is not named: {runs.tail(output)}")
    runs.last_state(shutil.copytree(soak.root / workdir, soak.root / "hosts-kept"))
    shutil.copytree(folder / "host0", folder / "host1", dirs_exist_ok=True)
    start(workdir).ends(0)
    runs.same_end(soak.root / workdir, soak.root / reference)
    yield f"both ended {seconds:.1f} s after process 1 met the image; kept {kept}"


def terminations(soak: Soak) -> Iterator[str]:
    """SIGTERM or Ctrl-C at any moment from a run's first line on, and in a save."""
    workdir, count = soak.root / "terminated-0", 0
    while count < soak.options.terminations:
        before = len(runs.rows_of(workdir))
        process = soak.start(workdir)
        has_printed(process)
        when = moment_to_terminate(soak, process, workdir, count)
        number, status = ((signal.SIGTERM, 0), (signal.SIGINT, 130))[count // 4 % 2]
        process.popen.send_signal(number)
        if (workdir / "result.json").exists():
            process.popen.wait()
            runs.same_end(workdir, soak.undisturbed())
            workdir = soak.root / f"terminated-{count + 1}"
            continue
        ended = process.popen.wait(runs.LONGEST_SECONDS)
        finished = (workdir / "result.json").exists()
        output = " ".join(process.ends(ended if finished else status).split())
        if f"stopped by {number.name}" not in output and not finished:
            raise Failed(f"{when}: no sentence: {runs.tail(output)}")
        rows = runs.rows_of(workdir)
        newest = max(runs.steps_of(workdir), default=0)
        if len(rows) > before and newest < rows[-1]["step"]:
            raise Failed(f"{when}: step {rows[-1]['step']} done, {newest} saved")
        count += 1
        yield f"{when}: {'finished' if finished else f'saved at {newest}'}"
    soak.finish(workdir)


def moment_to_terminate(soak: Soak, process: Process, workdir: Path, count: int) -> str:
    """Waits: for any moment, a save, the compiling, or an evaluation."""
    kind = ("at random", "saving", "compiling", "evaluating")[count % 4]
    rows = len(runs.rows_of(workdir))
    later = soak.rng.uniform(0, LATEST_SECONDS)
    if kind == "at random":
        later = soak.rng.uniform(0, soak.seconds - soak.silent_seconds)
    elif kind == "saving":
        process.wait_until(lambda: bool(runs.unfinished(workdir)))
    elif kind == "evaluating":
        # The row of a step that is evaluated comes after the evaluation.
        process.wait_until(
            lambda: (
                len(found := runs.rows_of(workdir)) != rows
                and found[-1]["step"] % 5 == 4
            )
        )
    process.wait_for(later)
    return f"{kind}, {later:.2f} s later"


def second_signal(soak: Soak) -> Iterator[str]:
    """A second SIGTERM while the run still finishes a long step."""
    overrides = [
        word.replace("batch_size=32", "batch_size=2048").replace(
            f"steps={soak.options.steps}", "steps=4"
        )
        for word in small_run(soak.options)
    ]
    slow = Runs(soak.root / "slow", overrides, soak.options.seed)
    slow.undisturbed()
    workdir = slow.root / "run"
    process = slow.start(workdir)
    process.wait_until(lambda: len(runs.rows_of(workdir)) > 0)
    process.popen.send_signal(signal.SIGTERM)
    if not process.wait_for(SECOND_SIGNAL_SECONDS):
        raise Failed("the run had saved before a second signal could be sent")
    process.popen.send_signal(signal.SIGTERM)
    output = process.ends(128 + signal.SIGTERM)
    if "stopped at once by a second SIGTERM" not in output:
        raise Failed(f"no sentence: {runs.tail(output)}")
    slow.finish(workdir)
    yield f"143, {SECOND_SIGNAL_SECONDS} s after the first"


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__.replace("_", "-"): scenario
    for scenario in (
        undisturbed,
        kills,
        disk_full,
        damaged,
        bit_anywhere,
        two_runs,
        clock,
        cut_metrics,
        broken_host,
        terminations,
        second_signal,
    )
}
