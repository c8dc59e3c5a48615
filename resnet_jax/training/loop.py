"""The training loop: one call runs a config in a workdir, or goes on where it was."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import rich.console
from tensorboardX import SummaryWriter

from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.config import Config, resolve
from resnet_jax.data.batch import Batch, Feed
from resnet_jax.evaluation.evaluator import EvalStep, evaluate_split
from resnet_jax.evaluation.metrics import Sums
from resnet_jax.training.checkpoints import Checkpoints, DivergedError
from resnet_jax.training.environment import command_line
from resnet_jax.training.precise_statistics import (
    check_precise_statistics,
    with_precise_statistics,
)
from resnet_jax.training.progress import (
    Progress,
    Throughput,
    derived_values,
    print_config,
    say,
)
from resnet_jax.training.report import write_report
from resnet_jax.training.result import make_result, print_result
from resnet_jax.training.setup import Setup, prepare
from resnet_jax.training.state import TrainState
from resnet_jax.workdir import Workdir

MANY_CLASSES = 100
"""From this many classes on, the top-5 error is reported too."""


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains a net as a config says; goes on where an earlier call was stopped.

    The workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
    result.json and report.html. A run killed at any moment and started again ends bit
    for bit where an undisturbed one ends, on the same number and kind of devices.

    Args:
      config: made by a config file's ``get_config``, or a Config.
      workdir: a folder, made where it is missing.
      console: where to print; standard output by default.

    Returns:
      The content of result.json: ``test_error`` as a share, ``test_errors`` of
      ``test_count``, and where it comes from.

    Raises:
      UserError: a fault in config, data or workdir, or a loss that is not finite.
    """
    # The order of a start, which a restart shares:
    # 1. Refuse what is wrong with the config and workdir, before any device is used.
    config = resolve(config)
    console = console or rich.console.Console()
    folder = Workdir(workdir)
    folder.refuse_other_run(config)
    result = folder.read_result()
    if result is not None:
        say(console, f"{folder.path} holds a finished run; nothing to do")
        print_result(console, result, folder.report)
        return result
    folder.prepare()
    with folder.lock():
        return _train(config, folder, console)


def _train(
    config: Config, folder: Workdir, console: rich.console.Console
) -> dict[str, Any]:
    # 2. Open the data and build the parts; write down what is going to run.
    setup = prepare(config)
    check_precise_statistics(setup)
    folder.write_config(config, setup.derived, command_line())
    _print_start(console, setup)
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        # 3. Restore the newest checkpoint that is whole, or make the first state.
        state, position, rows = _start(setup, checkpoints, folder, console)
        # 4. Run the steps that are left.
        if int(state.step) < setup.derived.steps:
            _Run(setup, checkpoints, folder, console, rows).run(state, position)
        # 5. All that is reported follows from the last checkpoint's rows.
        checkpoints.wait()
    result = make_result(setup, rows)
    write_report(folder, result, rows)
    folder.write_result(result)
    print_result(console, result, folder.report)
    return result


def _start(
    setup: Setup,
    checkpoints: Checkpoints,
    folder: Workdir,
    console: rich.console.Console,
) -> tuple[TrainState, int, list[dict[str, Any]]]:
    """The state to go on from, its global example index and the metrics so far.

    metrics.jsonl then holds just these: rows written after the checkpoint belong to
    steps that will be run again.
    """
    restored = checkpoints.restore_newest(
        setup.abstract_state(), warn=lambda text: say(console, f"warning: {text}")
    )
    if restored is None:
        folder.write_rows([])
        return setup.fresh_state(), 0, []
    state, content = restored
    folder.write_rows(content["rows"])
    say(console, f"going on from the checkpoint at step {int(state.step)}")
    return state, content["position"], content["rows"]


class _Run:
    """The steps of a run and what happens between them."""

    def __init__(
        self,
        setup: Setup,
        checkpoints: Checkpoints,
        folder: Workdir,
        console: rich.console.Console,
        rows: list[dict[str, Any]],
    ):
        self.setup, self.checkpoints, self.folder = setup, checkpoints, folder
        self.console, self.rows = console, rows
        self.throughput = Throughput()
        self.progress = Progress(console, setup.derived.steps)
        dataset = setup.dataset
        self.train_feed = setup.feed(dataset.train)
        self.eval_feeds: dict[str, Feed] = {
            split.name: setup.feed(split)
            for split in (dataset.holdout, dataset.test)
            if split is not None
        }
        self.eval_step: EvalStep = setup.eval_step()
        self.told_broken: set[str] = set()
        self.skipped_before = 0
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        self.began = time.perf_counter()

    def run(self, state: TrainState, position: int) -> None:
        """Runs from the state's step and global example index to the end; saves it."""
        config, derived = self.setup.config, self.setup.derived
        first = int(state.step)
        batch_size = derived.global_batch_size
        batches = self.train_feed.training_batches(position, batch_size, config.seed)
        train_step = self.setup.train_step()
        with contextlib.closing(batches), self.progress, self._tensorboard() as tb:
            for step in range(first + 1, derived.steps + 1):
                batch = self._next(batches)
                state = train_step(state, self.train_feed.resident, batch)
                if step == first + 1:
                    self._after_compiling(state, step)
                else:
                    self.throughput.count(batch_size)
                state = self._between(state, step, tb)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        with self.throughput.waiting():
            return next(batches)

    def _after_compiling(self, state: TrainState, step: int) -> None:
        """The first step compiles: it is kept out of all measured speeds."""
        state.step.block_until_ready()
        seconds = time.perf_counter() - self.began
        self.progress.message(f"data and compiled step ready in {seconds:.1f} s")
        self.throughput.restart()
        self.progress.start(step)

    def _between(self, state: TrainState, step: int, tb: SummaryWriter) -> TrainState:
        """What is due after a step: a row of metrics, an evaluation, a checkpoint."""
        config, derived = self.setup.config, self.setup.derived
        last = step == derived.steps
        saves = last or step % derived.checkpoint_every == 0
        # A checkpoint can be the best one only if it was evaluated.
        evaluates = last or step % derived.evaluate_every == 0
        evaluates = evaluates or (saves and config.checkpoint.best)
        if evaluates or step % config.training.log_every_steps == 0:
            state = self._write_row(state, step, evaluates, tb)
        if saves:
            self._save(state, step)
        if evaluates or saves:
            self.throughput.restart()
        return state

    def _write_row(
        self, state: TrainState, step: int, evaluates: bool, tb: SummaryWriter
    ) -> TrainState:
        self._refuse_bad_loss(state)
        sums = state.sums.summary()
        row = {
            "step": step,
            "epoch": step / self.setup.derived.steps_per_epoch,
            "learning_rate": float(state.learning_rate),
            "train_loss": sums["loss"],
            "train_error": sums["error"],
            **self.throughput.interval(),
        }
        if self.setup.config.data.on_error == "skip":
            skipped = len(self.train_feed.skipped)
            row["train_skipped"] = skipped - self.skipped_before
            self.skipped_before = skipped
        state = dataclasses.replace(state, sums=Sums.zeros())
        if evaluates:
            if step == self.setup.derived.steps:
                state = self._with_final_statistics(state)
            row |= self._evaluate(state)
            if "holdout_error" in row:
                schedule = self.setup.schedule
                remembered = schedule.after_evaluation(
                    state.schedule, row["holdout_error"]
                )
                state = dataclasses.replace(state, schedule=remembered)
        row["seconds"] = self.seconds_before + time.perf_counter() - self.began
        self._tell_broken()
        self.rows.append(row)
        self.folder.append_row(row)
        _write_to_tensorboard(tb, row)
        self.progress.show(row)
        self.throughput.restart()
        return state

    def _tell_broken(self) -> None:
        """Names each image that was skipped, once a run."""
        for feed in (self.train_feed, *self.eval_feeds.values()):
            for sentence in dict.fromkeys(feed.skipped):
                if sentence not in self.told_broken:
                    self.told_broken.add(sentence)
                    self.progress.message(f"warning: skipped: {sentence}")

    def _with_final_statistics(self, state: TrainState) -> TrainState:
        """Batch statistics recomputed for the last weights, if the config asks so."""
        examples = self.setup.config.evaluation.precise_statistics_examples
        if not examples:
            return state
        batches = math.ceil(examples / self.setup.derived.global_batch_size)
        self.progress.message(f"batch statistics taken anew over {batches} batches")
        return with_precise_statistics(self.setup, state, self.train_feed, batches)

    def _evaluate(self, state: TrainState) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for name, feed in self.eval_feeds.items():
            summary = evaluate_split(
                self.eval_step,
                state.evaluation_variables(),
                state.statistics,
                feed,
                self.setup.evaluation_batch_size,
            )
            if self.setup.dataset.num_classes < MANY_CLASSES:
                del summary["top5_error"]
            metrics |= {f"{name}_{key}": value for key, value in summary.items()}
        return metrics

    def _save(self, state: TrainState, step: int) -> None:
        self._refuse_bad_loss(state)
        content = {
            "position": step * self.setup.derived.global_batch_size,
            "config": dataclasses.asdict(self.setup.config),
            "rows": self.rows,
        }
        row = self.rows[-1] if self.rows and self.rows[-1]["step"] == step else {}
        try:
            self.checkpoints.save(state, content, row.get("holdout_error"))
        except DivergedError as error:
            raise self._diverged(str(error)) from error

    def _refuse_bad_loss(self, state: TrainState) -> None:
        bad_step = int(state.first_bad_step)
        if bad_step >= 0:
            raise self._diverged(f"the loss is not finite at step {bad_step}")

    def _diverged(self, what: str) -> DivergedError:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is step {steps[-1]}"
            if steps
            else "there is no checkpoint yet"
        )
        return DivergedError(
            f"{what}; {kept} in {self.folder.checkpoints}. Lower "
            "optimizer.learning_rate or add a warm-up, in another workdir"
        )

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        """TensorBoard's files, written anew from the rows so far.

        A killed run's files lack what was not flushed and may hold steps that will be
        run again.
        """
        for file in self.folder.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        with SummaryWriter(str(self.folder.tensorboard)) as writer:
            for row in self.rows:
                _write_to_tensorboard(writer, row)
            yield writer


def _print_start(console: rich.console.Console, setup: Setup) -> None:
    dataset, config = setup.dataset, setup.config
    abstract = setup.abstract_state()
    values = derived_values(setup.derived) | {
        "parameters": f"{count_parameters(abstract.params):,}",
        "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
    }
    print_config(console, config, values)
    for note in setup.derived.notes():
        say(console, note)
    parts = [
        dataset.train,
        *([dataset.holdout] if dataset.holdout else []),
        dataset.test,
    ]
    counts = ", ".join(f"{len(part):,} {part.name}" for part in parts)
    height, width, channels = dataset.image_shape
    say(
        console,
        f"{config.data.name}: {counts}; {height}x{width}x{channels}, "
        f"{dataset.num_classes} classes",
    )


def _write_to_tensorboard(writer: SummaryWriter, row: dict[str, Any]) -> None:
    """Writes ``test_error`` as ``error/test``: a metric's curves share a group."""
    for name, value in row.items():
        split, _, metric = name.partition("_")
        tag = f"{metric}/{split}" if split in ("train", "holdout", "test") else name
        if name not in ("step", "seconds"):
            writer.add_scalar(tag, value, row["step"])
