"""Training a detector: one run, from its config to its result.

``train_detector`` is the public call. ``_train_one`` starts or restarts a run in the
same five steps as a classifier's in training/train.py, whose loop it shares. The step
is in step.py.
"""

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from typing import Any

import rich.console

from resnet_jax import distributed, parallel
from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import DetectionConfig, resolve
from resnet_jax.config.schema import changed_fields
from resnet_jax.console import describe_seconds, make_console, print_facts, say
from resnet_jax.detection.batches import steps_per_epoch, training_batches
from resnet_jax.detection.detections import (
    Detections,
    load_detections,
    save_detections,
)
from resnet_jax.detection.detector import (
    detect_all,
    detection_program,
    finder,
    load_detector,
)
from resnet_jax.detection.evaluate import figures_of
from resnet_jax.detection.pretrained import initial_state, proposer_of
from resnet_jax.detection.procedures import train_four_steps, train_seeds
from resnet_jax.detection.report import DETECTIONS, write_detection_report
from resnet_jax.detection.result import headline, row_of
from resnet_jax.detection.sources import DetectionData, open_detection_data
from resnet_jax.detection.state import DetectionLearner, make_detection_learner
from resnet_jax.detection.step import make_detection_step
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import Preempted, UserError
from resnet_jax.training.progress import Progress
from resnet_jax.training.state import TrainState
from resnet_jax.training.stopping import StopSignal
from resnet_jax.training.tracking import TrackedRun, Trackers, check_installed
from resnet_jax.training.train import Run, Start, restored_state
from resnet_jax.workdir import Workdir


def train_detector(
    config: Any,
    workdir: str | os.PathLike[str],
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains a detector as a config says; continues where an earlier call stopped.

    The workdir holds config.json, metrics.jsonl, checkpoints/, result.json,
    detections.npz (of the test split) and report.html. A run that is killed at any
    moment and started again ends bit for bit where an undisturbed one ends, on the same
    number and kind of devices.

    Args:
      config: made by a config file's ``get_config``, or a ``DetectionConfig``.
      workdir: a folder, created if it is missing, or gs://BUCKET/FOLDER.
      console: where to print; standard output by default.

    Returns:
      The content of result.json: ``voc`` and perhaps ``coco`` with the precisions on
      the test split, as shares, and facts of the run. For several seeds, their means
      and deviations, and ``runs``.

    Raises:
      UserError: a fault in config, data or workdir, or a loss that is not finite.
      Preempted: a signal stopped the run, and it has saved.
    """
    config = resolve(config, DetectionConfig)
    console = console or make_console()
    if config.seeds > 1:
        return train_seeds(config, workdir, train_detector, console)
    if config.training.procedure == "four_steps":
        return train_four_steps(config, workdir, train_detector, console)
    return _train_one(config, workdir, console)


def _train_one(
    config: DetectionConfig,
    workdir: str | os.PathLike[str],
    console: rich.console.Console,
) -> dict[str, Any]:
    # 1. Refuse a workdir with another run; a finished run only prints its result.
    folder = Workdir(workdir, DetectionConfig)
    is_longer = folder.admit(config)
    result = folder.read_result() if not is_longer else None
    if distributed.broadcast(result is not None):
        result = result or folder.read_result() or {}
        say(console, f"{folder.path} holds a finished run; nothing to do")
        _print_result(console, result, folder)
        return result
    check_installed(config)
    tell = functools.partial(say, console)
    with (
        Progress(console) as progress,
        folder.created(),
        folder.lock(tell),
        StopSignal(tell) as stop,
        folder.compiled_programs(config.compilation_cache),
        contextlib.ExitStack() as tracking,
    ):
        # 2. Open the data; build net, optimizer and schedule.
        progress.phase("data")
        data = open_detection_data(config.data)
        if distributed.is_primary():
            folder.refuse_other_data(data.identity, folder.read_data())
        progress.phase("init")
        learner = _learner_for(config, data)
        proposer = proposer_of(learner)
        folder.check_shared()
        _print_start(console, learner, data, folder)
        with Checkpoints(folder.checkpoints, config.checkpoint, True) as checkpoints:
            # 3. Restore the newest whole checkpoint, or make the first state.
            restored = restored_state(learner, data, checkpoints, folder, tell)
            if restored is None:
                restored = learner.fresh_state(*initial_state(learner, tell)), Start()
            state, start = restored
            folder.remove_result()  # of a run that becomes longer
            derived, identity = learner.derived, data.identity
            folder.write_config(config, command_line(), derived, identity)
            # 4. Run the steps that are left.
            rows = start.rows
            tracked = TrackedRun(folder, config, rows, int(state.step), tell)
            trackers = tracking.enter_context(Trackers(tracked, learner, None))
            if int(state.step) < derived.steps or start.row_is_due:
                progress.phase("compiling")
                run = _DetectionRun(
                    learner,
                    data,
                    checkpoints,
                    folder,
                    progress,
                    stop,
                    start,
                    trackers,
                )
                run.resident = proposer
                try:
                    rows = run.to_the_end(state)
                except Preempted as stopped:
                    say(console, str(stopped))
                    raise
            checkpoints.wait()
        # 5. Report. Every figure follows from the rows in the last checkpoint.
        result = _facts(learner, data, rows)
        if config.training.procedure != "rpn":
            detections = _last_detections(folder, config, data)
            result = figures_of(data, detections, config) | result
        folder.write_result(result)
        if distributed.is_primary():
            write_detection_report(folder, result, rows, data)
        trackers.add_result(result)
    _print_result(console, result, folder)
    return result


class _DetectionRun(Run):
    """The steps of a detector's run; see ``Run``."""

    learner: DetectionLearner

    def open(self, dataset: DetectionData) -> None:
        """See ``Run``."""
        self.data = dataset
        self.feeds = {"train": _Skipped(), "test": _Skipped()}
        self.step = make_detection_step(self.learner)
        self.program = detection_program(
            (self.learner.model,), self.learner.mesh, self.config.data
        )

    def training_batches(self) -> Generator[Any]:
        """See ``Run``."""
        return training_batches(
            self.data.train,
            self.config.data,
            self.batch_size,
            self.config.seed,
            self.start.position // self.batch_size,
            mesh=self.learner.mesh,
            flip=self.config.augmentation.flip,
            skipped=self.feeds["train"].skipped,
        )

    def next_call(
        self, step: int, batches: Iterator[Any]
    ) -> tuple[Callable[..., TrainState], Any, int]:
        """See ``Run``."""
        del step
        return self.step, next(batches), 1

    def training_metrics(self, state: TrainState) -> dict[str, Any]:
        """See ``Run``."""
        return state.sums.summary()

    def with_final_statistics(self, state: TrainState) -> TrainState:
        """See ``Run``; a detector's statistics stay."""
        return state

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """See ``Run``; the detections go to the workdir."""
        if self.config.training.procedure == "rpn":
            return {}
        config, source = self.config, self.data.test
        detections = detect_all(
            self.program,
            (state.evaluation_variables(),),
            (state.statistics,),
            source,
            config.data,
            config.evaluation.batch_size or self.batch_size,
            self.learner.mesh,
            scales=config.detector.test_scales,
            skipped=self.feeds["test"].skipped,
            interrupted=self.stop.asked,
        )
        if distributed.is_primary():
            _save_detections(self.folder, self.data, detections)
        return row_of(figures_of(self.data, detections, config))


class _Skipped:
    """The sentences on the broken images of a split."""

    def __init__(self) -> None:
        self.skipped: list[str] = []


def _learner_for(config: DetectionConfig, data: DetectionData) -> DetectionLearner:
    mesh = parallel.data_mesh()
    parallel.check_processes(mesh)
    batch = config.training.global_batch_size
    return make_detection_learner(
        config,
        mesh,
        steps_per_epoch=steps_per_epoch(data.train, config.data, batch),
        num_classes=len(data.class_names),
    )


def _last_detections(
    folder: Workdir, config: DetectionConfig, data: DetectionData
) -> list[Detections]:
    """What the last evaluation found; found again if its file is lost or damaged."""
    distributed.wait_for_all("detections")
    try:
        *_, detections = load_detections(folder.path / DETECTIONS)
    except UserError:
        find = finder([load_detector(folder.path)])
        size = config.evaluation.batch_size or config.training.global_batch_size
        detections = find(source=data.test, batch_size=size)
        if distributed.is_primary():
            _save_detections(folder, data, detections)
    return detections


def _save_detections(
    folder: Workdir, data: DetectionData, detections: list[Detections]
) -> None:
    names = [data.test.name(index) for index in range(len(data.test))]
    save_detections(folder.path / DETECTIONS, names, data.class_names, detections)


def _facts(
    learner: DetectionLearner, data: DetectionData, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of result.json beside the figures."""
    config, last = learner.config, rows[-1]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {
        "procedure": config.training.procedure,
        "checkpoint": "last",
        "train_loss": last["train_loss"],
        "step": last["step"],
        "epoch": last["epoch"],
        "seed": config.seed,
        "model": config.model.name,
        "weights": config.model.weights,
        "parameters": count_parameters(learner.abstract_state().params),
        "training_images": len(data.train),
        "global_batch_size": config.training.global_batch_size,
        "images_per_second": statistics.median(speeds) if speeds else None,
        "seconds": last["seconds"],
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _print_start(
    console: rich.console.Console,
    learner: DetectionLearner,
    data: DetectionData,
    folder: Workdir,
) -> None:
    """Prints what will run, and the config fields that differ from their defaults."""
    config, derived, mesh = learner.config, learner.derived, learner.mesh
    parameters = count_parameters(learner.abstract_state().params)
    changed = [f"{name}={value}" for name, value in changed_fields(config).items()]
    counts = f"{len(data.train):,} train, {len(data.test):,} test"
    facts = {
        "model": f"Faster R-CNN, {config.model.name}, {parameters:,} parameters",
        "data": f"{config.data.name}: {counts}; {len(data.class_names)} classes",
        "length": f"{derived.steps:,} steps of {derived.global_batch_size:,}, "
        f"{derived.epochs:.4g} epochs",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "config": "\n".join(changed) + f"\nall fields: {folder.path / 'config.json'}",
    }
    print_facts(console, facts)
    notes = [*derived.notes(), *data.notes]
    for note in dict.fromkeys(notes):
        say(console, note)


def _print_result(
    console: rich.console.Console, result: dict[str, Any], folder: Workdir
) -> None:
    """Prints the facts of a finished run, its precision and its report."""
    facts = {
        "model": f"Faster R-CNN, {result['model']}, {result['parameters']:,} "
        "parameters",
        "length": f"{result['step']:,} steps of {result['global_batch_size']}, "
        f"{result['epoch']:.4g} epochs",
        "time": describe_seconds(result["seconds"]),
    }
    if result.get("images_per_second") is not None:
        facts["speed"] = f"{result['images_per_second']:,.2f} images/s (median)"
    print_facts(console, facts)
    if "voc" in result:
        say(console, headline(result))
    say(console, f"report: {folder.report}")
