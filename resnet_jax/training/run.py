"""The steps of a run, and what happens between them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import rich.console

from resnet_jax import distributed, parallel, storage
from resnet_jax.data.batch import Feed
from resnet_jax.errors import Preempted
from resnet_jax.evaluation.evaluator import EvalStep, Interrupted, evaluate_split
from resnet_jax.evaluation.metrics import Sums
from resnet_jax.training.checkpoints import Checkpoints, DivergedError
from resnet_jax.training.curves import Curves
from resnet_jax.training.precise_statistics import with_precise_statistics
from resnet_jax.training.profile import Profile
from resnet_jax.training.progress import Progress, Throughput
from resnet_jax.training.setup import Setup
from resnet_jax.training.state import TrainState
from resnet_jax.training.stepper import Stepper
from resnet_jax.training.stopping import StopSignal
from resnet_jax.workdir import Workdir

MANY_CLASSES = 100
"""From this many classes on, the top-5 error is reported too."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins or goes on, beside its state; a checkpoint holds it as JSON.

    Attributes:
      position: the global example index.
      rows: of metrics.jsonl so far.
      row_is_due: the run was stopped in the evaluation after the state's step.
      skipped: broken images that were replaced since the last row.
    """

    position: int = 0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    row_is_due: bool = False
    skipped: int = 0

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Start":
        """From the content of a checkpoint."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: content[name] for name in names if name in content})


class Run:
    """The steps of a run and what happens between them."""

    def __init__(
        self,
        setup: Setup,
        checkpoints: Checkpoints,
        folder: Workdir,
        console: rich.console.Console,
        stop: StopSignal,
        start: Start,
    ):
        """Opens the feeds."""
        self.setup, self.checkpoints, self.folder = setup, checkpoints, folder
        self.console, self.stop, self.start = console, stop, start
        self.rows = list(start.rows)
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
        self.skipped_before = -start.skipped
        self.profile = Profile(
            lambda: folder.mirror(folder.profile), setup.config.profile.range
        )
        self.seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.began = time.perf_counter()

    def run(self, state: TrainState) -> list[dict[str, Any]]:
        """Runs from the start's state to the end; returns all rows of metrics.

        Raises:
          Preempted: the run was asked to stop, and has saved.
        """
        step, last = int(state.step), self.setup.derived.steps
        stepper = Stepper(
            self.setup, self.train_feed, self.start.position, self.throughput.waiting
        )
        self.stop.agree_over(self.setup.mesh)
        with (
            contextlib.closing(stepper),
            contextlib.closing(self.profile),
            self.progress,
            self._curves() as curves,
        ):
            if self.start.row_is_due:
                state = self._between(state, step, curves, saved=True)
            while step < last:
                self.profile.before(step + 1)
                state, made, compiled = stepper.advance(
                    state, self._next_due(step) - step
                )
                step += made
                if compiled:
                    self._after_compiling(state, step)
                else:
                    self.throughput.count(
                        made * self.setup.config.training.global_batch_size
                    )
                if self.profile.after(step, state):
                    self.progress.message(f"profile of steps: {self.folder.profile}")
                state = self._between(state, step, curves)
        return self.rows

    def _next_due(self, step: int) -> int:
        """The first step after this one behind which the host has something to do."""
        config, derived = self.setup.config, self.setup.derived
        periods = (
            config.training.log_every_steps,
            derived.evaluate_every,
            derived.checkpoint_every,
        )
        due = [(step // period + 1) * period for period in periods]
        due += [end for end in self.profile.ends if end > step]
        return min(derived.steps, *due)

    def _after_compiling(self, state: TrainState, step: int) -> None:
        """A program's first call compiles: it is kept out of all measured speeds."""
        state.step.block_until_ready()
        self.stop.steps_were_made()
        if not self.progress.started:
            seconds = time.perf_counter() - self.began
            self.progress.message(f"data and compiled step ready in {seconds:.1f} s")
            self.progress.start(step)
        self.throughput.restart()

    def _between(
        self, state: TrainState, step: int, curves: Curves, saved: bool = False
    ) -> TrainState:
        """What is due after a step: a row of metrics, an evaluation, a checkpoint.

        Args:
          state: after the step.
          step: its number.
          curves: where metrics go as well.
          saved: the state came from a checkpoint of this step.
        """
        config, derived = self.setup.config, self.setup.derived
        last = step == derived.steps
        saves = last or step % derived.checkpoint_every == 0
        # A checkpoint can be the best one only if it was evaluated.
        evaluates = last or step % derived.evaluate_every == 0
        evaluates = evaluates or (saves and config.checkpoint.best)
        if evaluates or step % config.training.log_every_steps == 0:
            try:
                state = self._write_row(state, step, evaluates, curves)
            except Interrupted:
                self._preempted(state, step, saved, row_is_due=True)
        if saves:
            # A checkpoint of an interrupted evaluation lacks what that leaves behind.
            self._save(state, step, replace=saved)
            saved = True
        if not last and self.stop.asked():
            self._preempted(state, step, saved)
        if evaluates or saves:
            self.throughput.restart()
        return state

    def _preempted(
        self, state: TrainState, step: int, saved: bool, row_is_due: bool = False
    ) -> NoReturn:
        if not saved:
            self._save(state, step, row_is_due=row_is_due)
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by SIGTERM and saved at step {step}; the same command goes on"
        )

    def _write_row(
        self, state: TrainState, step: int, evaluates: bool, curves: Curves
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
        if self._skips:
            row["train_skipped"] = self._skipped()
        if evaluates:
            if step == self.setup.derived.steps:
                state = self._with_final_statistics(state)
            row |= self._evaluate(state)
        state = dataclasses.replace(state, sums=self._on_devices(Sums.zeros()))
        if "holdout_error" in row:
            remembered = self.setup.schedule.after_evaluation(
                state.schedule, row["holdout_error"]
            )
            state = dataclasses.replace(state, schedule=self._on_devices(remembered))
        self.skipped_before += row.get("train_skipped", 0)
        row["seconds"] = self.seconds_before + time.perf_counter() - self.began
        self._tell_broken()
        self.rows.append(row)
        self.folder.append_row(row)
        curves.add(row)
        self.progress.show(row)
        self.throughput.restart()
        return state

    def _on_devices(self, tree: Any) -> Any:
        """Host values as the step and the checkpoints want them: on all devices."""
        same = parallel.replicated(self.setup.mesh)
        return parallel.place(jax.device_get(tree), same)

    @property
    def _skips(self) -> bool:
        return self.setup.config.data.on_error == "skip"

    def _skipped(self) -> int:
        """Images replaced on all hosts since the last row."""
        total = distributed.sum_over_processes(len(self.train_feed.skipped))
        return total - self.skipped_before

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
                interrupted=self.stop.asked,
            )
            if self.setup.dataset.num_classes < MANY_CLASSES:
                del summary["top5_error"]
            metrics |= {f"{name}_{key}": value for key, value in summary.items()}
        return metrics

    def _save(
        self,
        state: TrainState,
        step: int,
        row_is_due: bool = False,
        replace: bool = False,
    ) -> None:
        self._refuse_bad_loss(state)
        start = Start(
            position=step * self.setup.derived.global_batch_size,
            rows=self.rows,
            row_is_due=row_is_due,
            skipped=self._skipped() if self._skips else 0,
        )
        content = {
            **dataclasses.asdict(start),
            "config": dataclasses.asdict(self.setup.config),
        }
        row = self.rows[-1] if self.rows and self.rows[-1]["step"] == step else {}
        try:
            self.checkpoints.save(
                state, content, row.get("holdout_error"), replace=replace
            )
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
    def _curves(self) -> Iterator[Curves]:
        """TensorBoard's file; those of earlier starts are deleted."""
        folder, writes = self.folder.tensorboard, distributed.is_primary()
        if writes:
            with storage.reached(folder):
                for file in folder.glob("events.out.tfevents.*"):
                    file.unlink()
        with (
            self.folder.mirror(folder) as mirror,
            Curves(
                mirror.path if writes else None,
                self.rows,
                warn=self.progress.message,
                flushed=mirror.copy,
            ) as curves,
        ):
            yield curves
