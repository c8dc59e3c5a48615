"""The analyses that experiments need besides training, stored as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import rich.console
from flax import linen as nn

from resnet_jax.analysis.gradients import gradient_norms
from resnet_jax.analysis.responses import responses_of_run
from resnet_jax.config import Config
from resnet_jax.console import say
from resnet_jax.data.batch import gather
from resnet_jax.data.dataset import open_dataset
from resnet_jax.data.feeds import make_feed
from resnet_jax.data.transforms import normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import Evaluator, evaluation_batch_size
from resnet_jax.evaluation.saved_run import load_run
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.surgery import deepen
from resnet_jax.paper.entries import AnalysisKind
from resnet_jax.paper.sections import analysis_file
from resnet_jax.training.train import learner_for
from resnet_jax.workdir import Workdir

DEEPER = 3
"""Factor on the blocks of each stage: 56 layers instead of 20."""


def analyse(
    kind: AnalysisKind,
    members: Mapping[str, Config],
    folder: Path,
    console: rich.console.Console,
) -> None:
    """Analyses the runs that were not analysed yet, except those that diverged.

    Args:
      kind: kind of analysis.
      members: configs of the runs, finished if they are trained at all, by folder.
      folder: contains their folders.
      console: where to print.
    """
    analysis = {"responses": _responses, "gradients": _gradients, "deepened": _deepened}
    for name, config in members.items():
        section, run, seed = name.split("/")
        number = int(seed.removeprefix("seed-"))
        file = analysis_file(folder / section, kind, run, number)
        workdir = Workdir(folder / name)
        if file.exists() or workdir.read_failure() is not None:
            continue
        say(console, f"{kind} of {name}")
        found: Any = analysis[kind](config, workdir)
        Workdir(file.parent).create()
        workdir.write(file, json.dumps(found) + "\n")


def _responses(_: Config, workdir: Workdir) -> list[tuple[str, float]]:
    """Name and standard deviation of each 3x3 layer's response, on the test set."""
    return [(found.layer, found.std) for found in responses_of_run(workdir.path)]


def _gradients(config: Config, _: Workdir) -> list[tuple[str, float]]:
    """Name and norm of each kernel's gradient, before the first step.

    The batch is the run's first, without augmentation.
    """
    dataset = open_dataset(config)
    learner = learner_for(config, dataset)
    state = learner.fresh_state(dataset.train.statistics())
    feed = make_feed(dataset.train, learner.mesh, config.data, config.augmentation)
    batches = feed.training_batches(0, config.training.global_batch_size, config.seed)
    images, labels = gather(feed.resident, next(batches))
    batches.close()
    found = gradient_norms(
        learner.model,
        {"params": state.params, "batch_stats": state.batch_stats},
        normalize(to_unit(images), state.statistics),
        labels,
    )
    return [(gradient.layer, gradient.norm) for gradient in found]


def _deepened(_: Config, workdir: Workdir) -> dict[str, Any]:
    """Test errors of a trained net, and of the same net with identity layers added."""
    run = load_run(workdir.path)
    if not isinstance(run.model, ResNet):
        raise UserError(f"{run.config.model.name} has no stages to deepen")
    sizes = [DEEPER * size for size in run.model.stage_sizes]
    deeper, deeper_variables = deepen(
        run.variables, run.model, sizes, jax.random.key(run.config.seed)
    )
    feed = run.feed(run.dataset.test)
    size = evaluation_batch_size(run.config, run.mesh)

    def errors(model: nn.Module, variables: Any) -> int:
        evaluator = Evaluator(model, run.mesh)
        return evaluator.evaluate(variables, run.statistics, feed, size)["errors"]

    return {
        "errors_before": errors(run.model, run.variables),
        "errors_after": errors(deeper, deeper_variables),
        "count": feed.num_examples,
        "blocks_before": sum(run.model.stage_sizes),
        "blocks_after": sum(sizes),
    }
