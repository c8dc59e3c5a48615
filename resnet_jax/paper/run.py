"""Runs the missing part of an experiment."""

import os
from collections.abc import Sequence

import rich.console

from resnet_jax.console import make_console, say
from resnet_jax.errors import UserError
from resnet_jax.paper.analyses import analyse
from resnet_jax.paper.entries import Experiment, PaperRun
from resnet_jax.paper.experiments import choose_runs, find_experiment
from resnet_jax.paper.sections import Section
from resnet_jax.paper.settings import Setting
from resnet_jax.training.runs import Member, train_members
from resnet_jax.training.train import train_one
from resnet_jax.workdir import Workdir


def run_experiment(
    name: str,
    workdir: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    seeds: int | None = None,
    setting: Setting | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Trains the runs of an experiment that are not finished, then analyses them.

    Each run has the folder ``workdir/DATASET[-SCALE]/RUN/seed-N``, a workdir of
    ``train``; experiments share runs. All runs get their first seed before any gets its
    second, so that a call stopped early has a result of each. The same call continues
    where it stopped.

    Args:
      name: of ``experiments.EXPERIMENTS``.
      workdir: holds all experiments.
      only: names of some of its runs; all by default.
      seeds: runs of each; as many as were published by default.
      setting: data set, scale and overrides; the published ones by default.
      console: where to print; standard output by default.

    Raises:
      UserError: an unknown name, a fault in a config, the data or a folder.
      Preempted: SIGTERM asked a run to stop, and it has saved.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"the seeds of a run must be at least 1, not {seeds}")
    console = console or make_console()
    experiment, setting = find_experiment(name), setting or Setting()
    runs = choose_runs(experiment, only)
    if not runs:
        raise UserError(f"{name} has nothing to run: its figures are only quoted")
    members = _members(runs, setting, seeds)
    folder = Workdir(workdir)
    folder.create()
    for section in {member.name.split("/")[0] for member in members}:
        Section(folder.path / section).note(setting, experiment.name)
    say(console, f"{experiment.title}: {len(members)} runs")
    if experiment.trains:
        train_members(members, folder.path, train_one, console)
    if experiment.analysis is not None:
        analyse(experiment.analysis, members, folder.path, console)
    _point_to_report(experiment, folder, console)


def _members(
    runs: Sequence[PaperRun], setting: Setting, seeds: int | None
) -> list[Member]:
    """Every run with its first seed, then every run with its second, and so on."""
    of_runs = [setting.members(run, seeds or run.seeds) for run in runs]
    most = max(len(members) for members in of_runs)
    return [
        members[index]
        for index in range(most)
        for members in of_runs
        if index < len(members)
    ]


def _point_to_report(
    experiment: Experiment, folder: Workdir, console: rich.console.Console
) -> None:
    say(
        console,
        f"{experiment.name} is complete; its table and figures: "
        f"resnet-jax paper report --workdir {folder.path}",
    )
