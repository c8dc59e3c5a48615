"""Trains and analyses the missing runs of an experiment."""

import itertools
import os
from collections.abc import Sequence

import rich.console

from resnet_jax.console import make_console, say
from resnet_jax.errors import UserError
from resnet_jax.paper.analyses import analyse
from resnet_jax.paper.experiments import choose_runs, find_experiment
from resnet_jax.paper.sections import Section
from resnet_jax.paper.settings import Setting
from resnet_jax.training.runs import train_members
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
    """Trains the unfinished runs of an experiment, then analyses them.

    Each run has the folder ``workdir/DATASET[-SCALE]/RUN/seed-N``, a workdir of
    ``train``, which experiments share. All runs get their first seed before any gets
    its second, so a call that is stopped early has a result for each. The same call
    continues where it stopped.

    Args:
      name: a name of ``experiments.EXPERIMENTS``.
      workdir: folder of all experiments.
      only: names of runs; all runs by default.
      seeds: seeds per run; by default as many as published.
      setting: data set, scale and overrides; the published ones by default.
      console: where to print; standard output by default.

    Raises:
      UserError: an unknown name, or an error in a config, the data or a folder.
      Preempted: a signal stopped a run, and it has saved.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {seeds}")
    console = console or make_console()
    experiment, setting = find_experiment(name), setting or Setting()
    runs = choose_runs(experiment, only)
    by_run = [
        setting.members(run, seeds or experiment.seeds_of(run)).items() for run in runs
    ]
    rounds = itertools.zip_longest(*by_run)
    members = dict(member for each in rounds for member in each if member is not None)
    folder = Workdir(workdir)
    with folder.created():
        for section in {name.split("/")[0] for name in members}:
            Section.note(folder.path / section, setting, experiment.name)
        say(console, f"{experiment.title}: {len(members)} runs")
        if experiment.trains:
            train_members(members, folder.path, train_one, console)
        if experiment.analysis is not None:
            analyse(experiment, members, folder.path, console)
    say(
        console,
        f"{experiment.name} is complete; its table and figures: "
        f"resnet-jax paper report --workdir {folder.path}",
    )
