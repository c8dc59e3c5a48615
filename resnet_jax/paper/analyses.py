"""The analyses that experiments need besides training, stored as JSON."""

import json
from collections.abc import Callable, Mapping
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
from resnet_jax.evaluation.evaluate import evaluate_nets
from resnet_jax.evaluation.evaluator import Evaluator, evaluation_batch_size
from resnet_jax.evaluation.protocols import from_json
from resnet_jax.evaluation.saved_run import load_run
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.surgery import deepen
from resnet_jax.paper.entries import Experiment
from resnet_jax.paper.sections import analysis_file
from resnet_jax.training.train import learner_for
from resnet_jax.workdir import Workdir

DEEPER = 3
"""Factor on the blocks of each stage: 56 layers instead of 20."""


def analyse(
    experiment: Experiment,
    members: Mapping[str, Config],
    folder: Path,
    console: rich.console.Console,
) -> None:
    """Analyses what was not analysed yet, except runs that diverged.

    Args:
      experiment: names the kind of analysis.
      members: configs of the runs, finished if they are trained at all, by folder.
      folder: contains their folders.
      console: where to print.
    """
    kind = str(experiment.analysis)
    if kind == "ensemble":
        _analyse_together(experiment, members, folder, console)
        return
    analysis: dict[str, Callable[[Config, Workdir], Any]] = {
        "responses": _responses,
        "gradients": _gradients,
        "deepened": _deepened,
        "ten_crop": lambda _, workdir: _test("ten_crop", workdir.path),
        "multi_scale": lambda _, workdir: _test("multi_scale", workdir.path),
    }
    for name, config in members.items():
        section, run, seed = name.split("/")
        number = int(seed.removeprefix("seed-"))
        file = analysis_file(folder / section, kind, f"{run}-{number}")
        workdir = Workdir(folder / name)
        if file.exists() or workdir.read_failure() is not None:
            continue
        say(console, f"{kind} of {name}")
        _write(file, analysis[kind](config, workdir))


def _analyse_together(
    experiment: Experiment,
    members: Mapping[str, Config],
    folder: Path,
    console: rich.console.Console,
) -> None:
    """Tests the ensemble of an experiment's runs, once all of them are finished."""
    runs = [
        f"{run.name}/seed-{seed}"
        for run in experiment.runs()
        for seed in range(experiment.seeds_of(run))
    ]
    for section in {name.split("/")[0] for name in members}:
        file = analysis_file(folder / section, "ensemble", experiment.name)
        workdirs = [Workdir(folder / section / run) for run in runs]
        missing = [
            f"{section}/{run}"
            for run, workdir in zip(runs, workdirs, strict=True)
            if workdir.read_result() is None
        ]
        if missing:
            say(console, f"no ensemble yet: {', '.join(missing)} not finished")
        elif not file.exists():
            say(console, f"ensemble of {len(runs)} nets")
            found = _test("multi_scale", *(workdir.path for workdir in workdirs))
            _write(file, {**found, "nets": runs})


def _write(file: Path, found: Any) -> None:
    folder = Workdir(file.parent)
    folder.create()
    folder.write(file, json.dumps(found) + "\n")


def _test(protocol: str, *workdirs: Path) -> dict[str, Any]:
    """Test errors of a trained net, or of several as an ensemble.

    Args:
      protocol: its kind; sizes are in proportion to each net's own view.
      *workdirs: of runs on the same data.

    Returns:
      errors, count, error, top5_error with 100 classes or more, and the protocol's
      description.
    """
    result = evaluate_nets(
        workdirs,
        protocol=protocol,
        ensemble="probabilities" if len(workdirs) > 1 else None,
        console=rich.console.Console(quiet=True),
    )
    first = result["nets"][0]
    found = result.get("ensemble", first)
    names = ("errors", "count", "error", "top5_error")
    return {
        **{name: found[name] for name in names if name in found},
        "protocol": from_json(first["protocol"]).describe(),
    }


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
