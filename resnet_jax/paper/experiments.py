"""All experiments, by name."""

from collections.abc import Sequence

from resnet_jax.errors import UserError, nearest
from resnet_jax.paper import imagenet, small_images
from resnet_jax.paper.entries import Experiment, PaperRun

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (*small_images.EXPERIMENTS, *imagenet.EXPERIMENTS)
}


def find_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
      UserError: there is none.
    """
    if name not in EXPERIMENTS:
        hint = nearest(name, EXPERIMENTS)
        raise UserError(f"there is no experiment {name!r}; {hint}")
    return EXPERIMENTS[name]


def choose_runs(experiment: Experiment, only: Sequence[str] = ()) -> list[PaperRun]:
    """The runs of an experiment, or those of them that are named.

    Raises:
      UserError: a name is not one of its runs.
    """
    runs = {run.name: run for run in experiment.runs()}
    for name in only:
        if name not in runs:
            raise UserError(
                f"{experiment.name} has no run {name!r}; {nearest(name, runs)}"
            )
    return [run for name, run in runs.items() if not only or name in only]
