"""All experiments, printed."""

import textwrap

import rich.console

from resnet_jax.console import say
from resnet_jax.paper.entries import Experiment
from resnet_jax.paper.experiments import EXPERIMENTS

_WIDTH = 88


def print_experiments(console: rich.console.Console | None = None) -> None:
    """Prints every experiment with what it is and its runs."""
    console = console or rich.console.Console()
    for experiment in EXPERIMENTS.values():
        say(console, f"{experiment.name}: {experiment.title}")
        say(console, f"    {experiment.source}")
        say(console, _runs(experiment))


def _runs(experiment: Experiment) -> str:
    runs = experiment.runs()
    names = [
        run.name if run.seeds == 1 else f"{run.name} ({run.seeds} seeds)"
        for run in runs
    ]
    text = f"runs: {', '.join(names)}" if runs else "no runs: quoted figures alone"
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent="    ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )
