"""Several runs as one: one after another, each in a folder of its own.

Finished ones are not run again, and an interrupted one goes on where it was.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.config import Config
from resnet_jax.data.feeds import LastDataset
from resnet_jax.training.checkpoints import DivergedError
from resnet_jax.training.compilation_cache import compiled_programs_in
from resnet_jax.training.loop import train_one
from resnet_jax.training.progress import describe_seconds, say
from resnet_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of several.

    Attributes:
      name: its folder below that of all.
      config: of one seed.
    """

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run has ended, or that it has not.

    Attributes:
      workdir: of the run.
      seed: of the run.
      result: the content of its result.json; None where it is not finished.
      failure: the sentence with which it diverged; None where it has not.
    """

    workdir: Workdir
    seed: int
    result: dict[str, Any] | None
    failure: str | None

    @property
    def is_open(self) -> bool:
        """Whether there are steps left to run."""
        return self.result is None and self.failure is None


def members_of(config: Config, prefix: str = "") -> list[Member]:
    """A run for every seed of a config, in folders that are named after the seeds."""
    seeds = range(config.seed, config.seed + config.seeds)
    return [
        Member(f"{prefix}seed-{seed}", dataclasses.replace(config, seed=seed, seeds=1))
        for seed in seeds
    ]


def train_members(
    members: Sequence[Member], folder: Path, console: rich.console.Console
) -> list[Outcome]:
    """Trains what is not finished yet.

    A run that diverges is written down as that, and is not run again: it would end in
    the same way. All other faults stop the call.

    Args:
      members: in order.
      folder: their folders are below it; it holds compiled programs for all of them.
      console: where to print.

    Raises:
      UserError: a fault in a config, the data or a folder.
      Preempted: SIGTERM asked the run to stop, and it has saved.
    """
    datasets, outcomes, ran = LastDataset(), [], False
    cache = next((m.config.compilation_cache for m in members), None)
    programs = None if cache is None else Workdir(folder).compiled_programs(cache)
    with compiled_programs_in(programs):
        for number, member in enumerate(members, start=1):
            title = f"[{number}/{len(members)}] {member.name}"
            outcome = read_outcome(folder, member)
            if distributed.broadcast(outcome.is_open):
                say(console, ("\n" if ran else "") + title)
                _train(member, outcome.workdir, console, datasets)
                outcome, ran = read_outcome(folder, member), True
            else:
                say(console, f"{title}: {describe(outcome)}")
            outcomes.append(outcome)
    return outcomes


def _train(
    member: Member,
    workdir: Workdir,
    console: rich.console.Console,
    datasets: LastDataset,
) -> None:
    try:
        train_one(member.config, workdir.path, console, datasets)
    except DivergedError as error:
        workdir.write_failure(str(error))
        say(console, str(error))


def read_outcome(folder: Path, member: Member) -> Outcome:
    """How a member's run stands.

    Raises:
      UserError: its folder holds another run.
    """
    workdir = Workdir(folder / member.name)
    workdir.refuse_other_run(member.config)
    return Outcome(
        workdir, member.config.seed, workdir.read_result(), workdir.read_failure()
    )


def describe(outcome: Outcome) -> str:
    """How a run has ended, in a few words."""
    if outcome.failure is not None:
        return f"diverged: {outcome.failure}"
    if outcome.result is None:
        return "not finished"
    result = outcome.result
    return (
        f"test error {100 * result['test_error']:.2f} %, "
        f"{describe_seconds(result['seconds'])}"
    )


@dataclasses.dataclass(frozen=True)
class Spread:
    """A metric over several runs.

    Attributes:
      mean: of the runs.
      deviation: their standard deviation, with n - 1 below; None for one run.
      count: n.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of one value or more."""
        numbers = list(values)
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), deviation, len(numbers))

    def percent(self) -> str:
        """As ``6.61 +- 0.16 % (5 seeds)``."""
        text = f"{100 * self.mean:.2f}"
        if self.deviation is not None:
            text += f" \u00b1 {100 * self.deviation:.2f}"
        return f"{text} % ({self.count} seed{'s' if self.count > 1 else ''})"
