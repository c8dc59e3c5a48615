"""Several runs as one: the seeds of a config, one after another.

Each run has its own folder. Finished runs are not repeated, and an interrupted run
continues where it stopped.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
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
from resnet_jax.evaluation.figures import Spread
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
    """Trains a config once for each of its seeds; see ``train.train``.

    The runs are in the folders ``seed-0``, ``seed-1``, ... of the workdir. The
    workdir's own result.json and report.html hold their mean and deviation.

    Raises:
      UserError: a fault in config, data or workdir, or all runs diverged.
      Preempted: a signal stopped a run, and it has saved.
    """
    folder = Workdir(workdir)
    folder.admit(config)
    with folder.created(), folder.lock(lambda text: say(console, text)):
        folder.write_config(config, command_line())
        outcomes = train_members(members_of(config), folder.path, train_one, console)
    result = _combined(outcomes)
    folder.write_result(result)
    write_seeds_report(folder, result)
    say(console, f"\ntest error {result['summary']}")
    for name, failure in result["failures"].items():
        say(console, f"{name} diverged: {failure}")
    say(console, f"report: {folder.report}")
    return result


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, if it did.

    Attributes:
      workdir: of the run.
      seed: of the run.
      result: the content of result.json; None if the run is not finished.
      failure: how the run diverged; None if it did not.
    """

    workdir: Workdir
    seed: int
    result: dict[str, Any] | None
    failure: str | None

    @classmethod
    def read(cls, workdir: Workdir, seed: int) -> "Outcome":
        """The outcome of the run in a folder."""
        return cls(workdir, seed, workdir.read_result(), workdir.read_failure())

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


def members_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config of each seed's run, by its folder: ``PREFIXseed-0``, ..."""
    return {
        f"{prefix}seed-{seed}": dataclasses.replace(config, seed=seed, seeds=1)
        for seed in range(config.seed, config.seed + config.seeds)
    }


def train_members(
    members: Mapping[str, Config],
    folder: Path,
    train_one: TrainOne,
    console: rich.console.Console,
) -> list[Outcome]:
    """Trains the runs that are not finished.

    A run that diverges is recorded and not run again, because it would diverge again.
    Any other fault ends the call.

    Args:
      members: configs of one seed, by the name of their folder.
      folder: contains these folders, and compiled programs for all runs.
      train_one: trains one of them.
      console: where to print.

    Raises:
      UserError: a fault in a config, the data or a folder.
      Preempted: a signal stopped a run, and it has saved.
    """
    datasets, outcomes, ran = LastDataset(), [], False
    cache = next((config.compilation_cache for config in members.values()), None)
    with Workdir(folder).compiled_programs(cache):
        for number, (name, config) in enumerate(members.items(), start=1):
            title = f"[{number}/{len(members)}] {name}"
            workdir = Workdir(folder / name)
            is_longer = workdir.admit(config)
            outcome = Outcome.read(workdir, config.seed)
            if distributed.broadcast(outcome.is_open or is_longer):
                say(console, ("\n" if ran else "") + title)
                ran = True
                try:
                    train_one(config, workdir.path, console, datasets)
                except DivergedError as error:
                    workdir.write_failure(str(error))
                    say(console, str(error))
                outcome = Outcome.read(workdir, config.seed)
            else:
                say(console, f"{title}: {outcome.describe()}")
            outcomes.append(outcome)
    return outcomes


def mean_errors(results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean and deviation of every error that results have, for result.json."""
    means: dict[str, float | None] = {}
    for name in ("holdout_error", "test_error", "train_error"):
        values = [result[name] for result in results if name in result]
        if values:
            spread = Spread.of(values)
            means |= {name: spread.mean, f"{name}_deviation": spread.deviation}
    return means


def _combined(outcomes: list[Outcome]) -> dict[str, Any]:
    """The content of result.json over several seeds."""
    names = [outcome.workdir.path.name for outcome in outcomes]
    ended = list(zip(names, outcomes, strict=True))
    results = {name: o.result for name, o in ended if o.result is not None}
    if not results:
        raise UserError(f"all {len(outcomes)} runs diverged: {outcomes[0].failure}")
    first, *_ = all_results = list(results.values())
    kept = ("step", "epoch", "model", "parameters", "multiply_adds", "data")
    return {
        **mean_errors(all_results),
        "summary": Spread.of(r["test_error"] for r in all_results).percent(),
        "checkpoint": "last",
        **{name: first[name] for name in (*kept, "test_count")},
        "runs": results,
        "failures": {name: o.failure for name, o in ended if o.failure is not None},
        "seconds": sum(result["seconds"] for result in all_results),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
