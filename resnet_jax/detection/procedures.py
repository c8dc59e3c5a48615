"""Several runs as one: the seeds of a config, and the paper's four steps.

Each run has its own folder. Finished runs are not repeated, and an interrupted run
continues where it stopped.
"""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import rich.console

from resnet_jax.config import DetectionConfig
from resnet_jax.console import say
from resnet_jax.detection.detector import LAST_STEP
from resnet_jax.detection.result import headline
from resnet_jax.environment import command_line, environment
from resnet_jax.evaluation.figures import Spread
from resnet_jax.training.runs import members_of
from resnet_jax.workdir import Workdir

Train = Callable[
    [DetectionConfig, str | os.PathLike[str], rich.console.Console], dict[str, Any]
]
"""``train.train_detector``."""


def train_seeds(
    config: DetectionConfig,
    workdir: str | os.PathLike[str],
    train: Train,
    console: rich.console.Console,
) -> dict[str, Any]:
    """Trains a config once for each of its seeds, in ``seed-0``, ``seed-1``, ...

    The workdir's own result.json holds their mean and deviation (n - 1).
    """
    runs = {}
    with _folder_of_runs(config, workdir, console) as folder:
        for number, (name, member) in enumerate(members_of(config).items(), start=1):
            say(console, f"[{number}/{config.seeds}] {name}")
            runs[name] = train(member, folder.path / name, console)
        result = _over_seeds(runs)
        folder.write_result(result)
    say(console, f"mAP by area over {len(runs)} seeds: {result['summary']}")
    return result


def _over_seeds(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(runs.values()))
    kept = (
        *("step", "epoch", "model", "parameters", "data", "protocol"),
        *("global_batch_size", "images", "objects"),
    )
    voc: dict[str, Any] = {}
    for name in ("map_area", "map_11"):
        values = [run["voc"][name] for run in runs.values()]
        if None not in values:
            spread = Spread.of(values)
            voc |= {name: spread.mean, f"{name}_deviation": spread.deviation}
    summary = "none"
    if "map_area" in voc:
        summary = Spread.of(run["voc"]["map_area"] for run in runs.values()).percent()
    return {
        **{name: first[name] for name in kept},
        "voc": voc,
        "train_loss": statistics.mean(run["train_loss"] for run in runs.values()),
        "summary": summary,
        "checkpoint": "last",
        "runs": runs,
        "seconds": sum(run["seconds"] for run in runs.values()),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def train_four_steps(
    config: DetectionConfig,
    workdir: str | os.PathLike[str],
    train: Train,
    console: rich.console.Console,
) -> dict[str, Any]:
    """The alternating training of Faster R-CNN (Ren et al. 2015, section 3.2).

    1. ``rpn``: the RPN and a net, from the weights of a classifier.
    2. ``fast_rcnn``: the head and another net from these weights, on the proposals of
       the first.
    3. ``shared_rpn``: only the RPN, on the second's net.
    4. ``shared_fast_rcnn``: only the tail and the head, on the proposals of the third.

    Each step is a run of the config's length in a folder of the workdir. The last one
    is the detector; the workdir's result.json is its.
    """
    names = ("rpn", "fast_rcnn", "shared_rpn", LAST_STEP)
    with _folder_of_runs(config, workdir, console) as folder:
        paths = {name: os.fspath(folder.path / name) for name in names}
        for number, (name, member) in enumerate(_four_steps(config, paths), start=1):
            say(console, f"[{number}/4] {name}")
            result = train(member, paths[name], console)
        folder.write_result(result)
    say(console, headline(result))
    return result


def _four_steps(
    config: DetectionConfig, paths: dict[str, str]
) -> Iterator[tuple[str, DetectionConfig]]:
    """The names and configs of the four runs."""
    shared: tuple[str, ...] = ("stem", "stage1", "stage2", "stage3")
    if config.model.name.startswith("vgg"):
        shared = tuple(f"stage{number}" for number in range(1, 6))

    def step(procedure: str, proposals: str | None = None, **model: Any) -> Any:
        training = dataclasses.replace(
            config.training, procedure=procedure, proposals=proposals
        )
        backbone = dataclasses.replace(config.model, **model)
        return dataclasses.replace(config, training=training, model=backbone)

    yield "rpn", step("rpn")
    yield "fast_rcnn", step("fast_rcnn", paths["rpn"])
    of_shared: dict[str, Any] = {"frozen": shared, "frozen_statistics": True}
    yield "shared_rpn", step("rpn", weights=paths["fast_rcnn"], **of_shared)
    yield (
        LAST_STEP,
        step("fast_rcnn", weights=paths["shared_rpn"], **of_shared),
    )


@contextlib.contextmanager
def _folder_of_runs(
    config: DetectionConfig,
    workdir: str | os.PathLike[str],
    console: rich.console.Console,
) -> Iterator[Workdir]:
    """The workdir of several runs, which holds their config."""
    folder = Workdir(workdir, DetectionConfig)
    folder.admit(config)
    with folder.created(), folder.lock(lambda text: say(console, text)):
        folder.write_config(config, command_line())
        yield folder
