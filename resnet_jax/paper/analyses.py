"""What is computed beside the training, and kept as JSON beside the runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console

from resnet_jax.analysis.gradients import gradient_norms
from resnet_jax.data.batch import gather
from resnet_jax.data.transforms import normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import evaluate_split, make_eval_step
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.surgery import deepen
from resnet_jax.paper.entries import AnalysisKind
from resnet_jax.paper.sections import analysis_file
from resnet_jax.training.members import Member
from resnet_jax.training.opened import open_run
from resnet_jax.training.progress import say
from resnet_jax.training.responses import responses_of_run
from resnet_jax.training.setup import prepare
from resnet_jax.workdir import Workdir

DEEPER = 3
"""Times as many blocks a stage: 56 layers in place of 20."""


def analyse(
    kind: AnalysisKind,
    members: Sequence[Member],
    folder: Path,
    console: rich.console.Console,
) -> None:
    """Analyses the runs that were not yet; a run that diverged is left out.

    Args:
      kind: of the analysis.
      members: finished, where they are trained at all.
      folder: theirs are below it.
      console: where to print.
    """
    for member in members:
        section, run, seed = member.name.split("/")
        file = analysis_file(
            folder / section, kind, run, int(seed.removeprefix("seed-"))
        )
        workdir = Workdir(folder / member.name)
        if file.exists() or workdir.read_failure() is not None:
            continue
        say(console, f"{kind} of {member.name}")
        found = _ANALYSES[kind](member, workdir)
        Workdir(file.parent).prepare()
        workdir.write(file, json.dumps(found) + "\n")


def _responses(_: Member, workdir: Workdir) -> list[tuple[str, float]]:
    """Name and standard deviation of each 3x3 layer's response, on the test set."""
    return [(found.layer, found.std) for found in responses_of_run(workdir.path)]


def _gradients(member: Member, _: Workdir) -> list[tuple[str, float]]:
    """Name and norm of each kernel's gradient, over the run's first batch, unchanged.

    The net is in its first state.
    """
    setup = prepare(member.config)
    state, feed = setup.fresh_state(), setup.feed(setup.dataset.train)
    batches = feed.training_batches(
        0, member.config.training.global_batch_size, member.config.seed
    )
    images, labels = gather(feed.resident, next(batches))
    batches.close()
    found = gradient_norms(
        setup.model,
        {"params": state.params, "batch_stats": state.batch_stats},
        normalize(to_unit(images), state.statistics),
        labels,
    )
    return [(gradient.layer, gradient.norm) for gradient in found]


def _deepened(_: Member, workdir: Workdir) -> dict[str, Any]:
    """Test errors of a trained net, and of one with identity layers added to it."""
    run = open_run(workdir.path)
    setup, variables = run.setup, run.state.evaluation_variables()
    if not isinstance(setup.model, ResNet):
        raise UserError(f"{setup.config.model.name} has no stages to deepen")
    sizes = [DEEPER * size for size in setup.model.stage_sizes]
    deeper, deeper_variables = deepen(
        variables, setup.model, sizes, jax.random.key(setup.config.seed)
    )
    feed = setup.feed(run.split)
    errors = [
        evaluate_split(
            make_eval_step(model, setup.mesh),
            weights,
            run.state.statistics,
            feed,
            setup.evaluation_batch_size,
        )["errors"]
        for model, weights in (
            (setup.model, variables),
            (deeper, deeper_variables),
        )
    ]
    return {
        "errors_before": errors[0],
        "errors_after": errors[1],
        "count": feed.num_examples,
        "blocks_before": sum(setup.model.stage_sizes),
        "blocks_after": sum(sizes),
    }


_ANALYSES: dict[AnalysisKind, Callable[[Member, Workdir], Any]] = {
    "responses": _responses,
    "gradients": _gradients,
    "deepened": _deepened,
}
