"""Several runs as one: the seeds of a config, one after another.

Each run has its own folder. Finished runs are not run again, and an interrupted one
continues where it stopped.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.checkpoints import DivergedError
from resnet_jax.config import Config
from resnet_jax.console import describe_seconds, say
from resnet_jax.data.feeds import LastDataset
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError
from resnet_jax.training.compilation_cache import compiled_programs_in
from resnet_jax.training.report import write_seeds_report
from resnet_jax.workdir import Workdir

TrainOne = Callable[
    [Config, str | os.PathLike[str], rich.console.Console, LastDataset], dict[str, Any]
]
"""``train.train_one``."""


def train_seeds(
    config: Config,
    workdir: str | os.PathLike[str],
    train_one: TrainOne,
    console: rich.console.Console,
) -> dict[str, Any]:
    """Trains a config once for each of its seeds.

    The runs are in the folders ``seed-0``, ``seed-1``, ... of the workdir. The
    workdir's own result.json and report.html hold their mean and deviation.

    Args:
      config: with ``seeds`` above 1.
      workdir: of all runs.
      train_one: trains one of them.
      console: where to print.

    Returns:
      The content of result.json; see ``train.train``.

    Raises:
      UserError: a fault in config, data or workdir, or all runs diverged.
      Preempted: SIGTERM stopped a run, and it has saved.
    """
    folder = Workdir(workdir)
    folder.refuse_other_run(config)
    folder.create()
    with folder.lock(lambda text: say(console, text)):
        folder.write_config(config, None, command_line())
        outcomes = train_members(members_of(config), folder.path, train_one, console)
    result = _combined(outcomes)
    folder.write_result(result)
    write_seeds_report(folder, result)
    say(console, "")
    say(console, f"test error {result['summary']}")
    for name, failure in result["failures"].items():
        say(console, f"{name} diverged: {failure}")
    say(console, f"report: {folder.report}")
    return result


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of several.

    Attributes:
      name: its folder, below the folder of all.
      config: of one seed.
    """

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, if it has.

    Attributes:
      workdir: of the run.
      seed: of the run.
      result: the content of result.json; None if the run is not finished.
      failure: how the run diverged; None if it has not.
    """

    workdir: Workdir
    seed: int
    result: dict[str, Any] | None
    failure: str | None

    @property
    def is_open(self) -> bool:
        """Whether there are steps left to run."""
        return self.result is None and self.failure is None

    def describe(self) -> str:
        """The outcome in a few words."""
        if self.failure is not None:
            return f"diverged: {self.failure}"
        if self.result is None:
            return "not finished"
        error, seconds = self.result["test_error"], self.result["seconds"]
        return f"test error {100 * error:.2f} %, {describe_seconds(seconds)}"


def members_of(config: Config, prefix: str = "") -> list[Member]:
    """A run for each seed of a config, in folders named after the seeds."""
    seeds = range(config.seed, config.seed + config.seeds)
    return [
        Member(f"{prefix}seed-{seed}", dataclasses.replace(config, seed=seed, seeds=1))
        for seed in seeds
    ]


def train_members(
    members: Sequence[Member],
    folder: Path,
    train_one: TrainOne,
    console: rich.console.Console,
) -> list[Outcome]:
    """Trains the runs that are not finished.

    A run that diverges is recorded and not run again, because it would diverge again.
    Any other fault ends the call.

    Args:
      members: in order.
      folder: contains their folders, and compiled programs for all of them.
      train_one: trains one of them.
      console: where to print.

    Raises:
      UserError: a fault in a config, the data or a folder.
      Preempted: SIGTERM stopped a run, and it has saved.
    """
    datasets, outcomes, ran = LastDataset(), [], False
    cache = next((member.config.compilation_cache for member in members), None)
    programs = None if cache is None else Workdir(folder).compiled_programs(cache)
    with compiled_programs_in(programs):
        for number, member in enumerate(members, start=1):
            title = f"[{number}/{len(members)}] {member.name}"
            outcome = read_outcome(folder, member)
            if distributed.broadcast(outcome.is_open):
                say(console, ("\n" if ran else "") + title)
                workdir, ran = outcome.workdir, True
                try:
                    train_one(member.config, workdir.path, console, datasets)
                except DivergedError as error:
                    workdir.write_failure(str(error))
                    say(console, str(error))
                outcome = read_outcome(folder, member)
            else:
                say(console, f"{title}: {outcome.describe()}")
            outcomes.append(outcome)
    return outcomes


def read_outcome(folder: Path, member: Member) -> Outcome:
    """The outcome of a member's run.

    Raises:
      UserError: its folder holds another run.
    """
    workdir = Workdir(folder / member.name)
    workdir.refuse_other_run(member.config)
    return Outcome(
        workdir, member.config.seed, workdir.read_result(), workdir.read_failure()
    )


@dataclasses.dataclass(frozen=True)
class Spread:
    """A metric over several runs.

    Attributes:
      mean: of the runs.
      deviation: their sample standard deviation (n - 1); None for one run.
      count: n.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        numbers = list(values)
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), deviation, len(numbers))

    def percent(self) -> str:
        """As ``6.61 +- 0.16 % (5 seeds)``."""
        text = f"{100 * self.mean:.2f}"
        if self.deviation is not None:
            text += f" \u00b1 {100 * self.deviation:.2f}"
        return f"{text} % ({self.count} seed{'s' if self.count > 1 else ''})"


def _combined(outcomes: list[Outcome]) -> dict[str, Any]:
    """The content of result.json over several seeds."""
    results = {o.workdir.path.name: o.result for o in outcomes if o.result is not None}
    failures = {
        o.workdir.path.name: o.failure for o in outcomes if o.failure is not None
    }
    if not results:
        raise UserError(f"all {len(outcomes)} runs diverged: {outcomes[0].failure}")
    first = next(iter(results.values()))
    metrics: dict[str, Any] = {}
    for name in ("test_error", "holdout_error", "train_error"):
        if name in first:
            spread = Spread.of(result[name] for result in results.values())
            metrics |= {name: spread.mean, f"{name}_deviation": spread.deviation}
    test_error = Spread.of(result["test_error"] for result in results.values())
    kept = ("step", "epoch", "model", "parameters", "multiply_adds", "data")
    return {
        **metrics,
        "summary": test_error.percent(),
        "checkpoint": "last",
        **{name: first[name] for name in kept},
        "test_count": first["test_count"],
        "runs": results,
        "failures": failures,
        "seconds": sum(result["seconds"] for result in results.values()),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
