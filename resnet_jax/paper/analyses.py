"""The analyses that experiments need besides training, stored as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from resnet_jax.evaluation import protocols
from resnet_jax.evaluation.evaluate import evaluate_nets
from resnet_jax.evaluation.evaluator import Evaluator, evaluation_batch_size
from resnet_jax.evaluation.nets import TrainedNet, load_net
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
    kind = experiment.analysis
    if kind == "ensemble":
        _analyse_together(experiment, members, folder, console)
        return
    analysis: dict[str, Callable[[Config, Workdir], Any]] = {
        "responses": _responses,
        "gradients": _gradients,
        "deepened": _deepened,
        "ten_crop": partial(_tested, "ten_crop"),
        "multi_scale": partial(_tested, "multi_scale"),
    }
    for name, config in members.items():
        section, run, seed = name.split("/")
        number = int(seed.removeprefix("seed-"))
        file = analysis_file(folder / section, str(kind), f"{run}-{number}")
        workdir = Workdir(folder / name)
        if file.exists() or workdir.read_failure() is not None:
            continue
        say(console, f"{kind} of {name}")
        _write(file, analysis[str(kind)](config, workdir))


def _analyse_together(
    experiment: Experiment,
    members: Mapping[str, Config],
    folder: Path,
    console: rich.console.Console,
) -> None:
    """Tests the ensemble of an experiment's runs, once all of them are finished."""
    for section in {name.split("/")[0] for name in members}:
        file = analysis_file(folder / section, "ensemble", experiment.name)
        names = [
            f"{section}/{run.name}/seed-{seed}"
            for run in experiment.runs()
            for seed in range(experiment.seeds_of(run))
        ]
        workdirs = [Workdir(folder / name) for name in names]
        missing = [
            name
            for name, workdir in zip(names, workdirs, strict=True)
            if workdir.read_result() is None
        ]
        if missing:
            say(console, f"no ensemble yet: {', '.join(missing)} not finished")
        elif not file.exists():
            say(console, f"ensemble of {len(names)} nets")
            nets = [load_net(workdir.path) for workdir in workdirs]
            found = _test(nets, "multi_scale")
            members_of_it = [name.removeprefix(f"{section}/") for name in names]
            _write(file, {**found, "nets": members_of_it})


def _write(file: Path, found: Any) -> None:
    Workdir(file.parent).create()
    Workdir(file.parent).write(file, json.dumps(found) + "\n")


def _tested(kind: str, _: Config, workdir: Workdir) -> dict[str, Any]:
    """Test errors of a trained net with the views of a protocol."""
    return _test([load_net(workdir.path)], kind)


def _test(nets: Sequence[TrainedNet], kind: str) -> dict[str, Any]:
    """Test errors of a net, or of several as an ensemble.

    Args:
      nets: of runs on the same data.
      kind: of protocol; its sizes are in proportion to each net's own view.

    Returns:
      errors, count, error, top5_error with 100 classes or more, and the protocol's
      description.
    """
    quiet = rich.console.Console(quiet=True)
    several = len(nets) > 1
    result = evaluate_nets(
        nets,
        protocol=kind,
        ensemble="probabilities" if several else None,
        console=quiet,
    )
    found = result["ensemble"] if several else result["nets"][0]
    names = ("errors", "count", "error", "top5_error")
    return {
        **{name: found[name] for name in names if name in found},
        "protocol": protocols.parse(kind, nets[0].protocol).describe(),
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
