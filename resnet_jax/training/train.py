"""Training: one run, from its config to its result.

Read top to bottom: ``train_one`` starts or restarts a run in five numbered steps,
``Run.to_the_end`` is the training loop, and ``Run.after_step`` does what is due
between steps. The step itself is in step.py, the state it changes in state.py, and what
is saved in ../checkpoints.py.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn

import jax
import rich.console

from resnet_jax import distributed, parallel
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import Config, resolve
from resnet_jax.console import make_console, say
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.feeds import LastDataset, ResidentFeed, is_resident, make_feed
from resnet_jax.environment import command_line
from resnet_jax.errors import Preempted, UserError
from resnet_jax.evaluation.evaluator import (
    Evaluator,
    Interrupted,
    evaluation_batch_size,
)
from resnet_jax.evaluation.precise_statistics import (
    check_precise_statistics,
    precise_variables,
)
from resnet_jax.identity import Identity
from resnet_jax.training.pretrained import pixel_statistics
from resnet_jax.training.profile import Profile
from resnet_jax.training.progress import Progress, Throughput, print_start
from resnet_jax.training.report import (
    add_pictures,
    make_result,
    print_result,
    write_report,
)
from resnet_jax.training.runs import train_seeds
from resnet_jax.training.state import Learner, TrainState, make_learner
from resnet_jax.training.step import call_length, make_train_step, make_train_steps
from resnet_jax.training.stopping import StopSignal
from resnet_jax.training.tracking import TrackedRun, Trackers, check_installed
from resnet_jax.weights import load_weights
from resnet_jax.workdir import Workdir

STEPS_PER_CALL = 128
"""On accelerators with the data on the devices, unless the config says otherwise."""


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains a net as a config says; continues where an earlier call stopped.

    The workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
    result.json and report.html. A run that is killed at any moment and started again
    ends bit for bit where an undisturbed one ends, on the same number and kind of
    devices. With several processes, all of them call this in ``distributed.started``.

    If ``config.seeds`` is above 1, there is one run for each seed, in the folders
    ``seed-0``, ``seed-1``, ... of the workdir; see ``runs.train_seeds``.

    Args:
      config: made by a config file's ``get_config``, or a ``Config``.
      workdir: a folder, created if it is missing, or gs://BUCKET/FOLDER.
      console: where to print; standard output by default.

    Returns:
      The content of result.json. For one run: ``test_error`` as a fraction,
      ``test_errors`` of ``test_count``, and facts of the run. For several seeds:
      ``test_error`` is the mean, ``test_error_deviation`` the standard deviation, and
      ``runs`` has each run.

    Raises:
      UserError: a fault in config, data or workdir, or a loss that is not finite.
      Preempted: a signal stopped the run, and it has saved.
    """
    config = resolve(config)
    console = console or make_console()
    if config.seeds > 1:
        return train_seeds(config, workdir, train_one, console)
    return train_one(config, workdir, console)


def train_one(
    config: Config,
    workdir: str | os.PathLike[str],
    console: rich.console.Console,
    datasets: LastDataset | None = None,
) -> dict[str, Any]:
    """Trains or continues one run; ``datasets`` opens the data of runs in a row."""
    # 1. Refuse a workdir with another run; a finished run only prints its result.
    folder = Workdir(workdir)
    is_longer = folder.admit(config)
    show = distributed.is_primary() and not is_longer
    result = folder.read_result() if show else None
    if distributed.broadcast(result is not None):
        result = result or folder.read_result() or {}
        say(console, f"{folder.path} holds a finished run; nothing to do")
        if not folder.report.exists():  # killed after it wrote result.json
            write_report(folder, result, folder.read_rows())
        print_result(console, result, folder.report)
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
        dataset = datasets.open(config) if datasets else open_dataset(config)
        if distributed.is_primary():
            folder.refuse_other_data(dataset.identity, folder.read_data())
        progress.phase("init")
        learner = learner_for(config, dataset)
        check_precise_statistics(config, learner.abstract_state().batch_stats)
        folder.check_shared()
        print_start(console, learner, dataset, folder.path / "config.json")
        with Checkpoints(folder.checkpoints, config.checkpoint, True) as checkpoints:
            # 3. Restore the newest whole checkpoint, or make the first state. Only then
            # write config.json: a start that fails can be repeated in other ways.
            restored = restored_state(learner, dataset, checkpoints, folder, tell)
            state, start = restored or (_first_state(learner, dataset, tell), Start())
            folder.remove_result()  # of a run that becomes longer
            identity = dataset.identity
            folder.write_config(config, command_line(), learner.derived, identity)
            # 4. Run the steps that are left.
            rows = start.rows
            tracked = TrackedRun(folder, config, rows, int(state.step), tell)
            trackers = tracking.enter_context(Trackers(tracked, learner, dataset))
            if int(state.step) < learner.derived.steps or start.row_is_due:
                progress.phase("compiling")
                run = Run(
                    learner,
                    dataset,
                    checkpoints,
                    folder,
                    progress,
                    stop,
                    start,
                    trackers,
                )
                try:
                    rows = run.to_the_end(state)
                except Preempted as stopped:
                    say(console, str(stopped))
                    raise
            checkpoints.wait()
        # 5. Report. Every figure follows from the rows in the last checkpoint.
        result = make_result(learner, dataset, rows)
        folder.write_result(result)
        write_report(folder, result, rows)
        trackers.add_result(result)
    print_result(console, result, folder.report)
    if datasets is None and distributed.process_count() == 1:
        add_pictures(folder, result, rows, console)
    return result


def learner_for(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh | None = None
) -> Learner:
    """The learner for a config and its data, on all devices by default."""
    mesh = mesh or parallel.data_mesh()
    parallel.check_processes(mesh)
    steps_per_call(config, dataset, mesh)
    return make_learner(
        config,
        mesh,
        num_examples=len(dataset.train),
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
    )


@jax.jit
def _copy(step: jax.Array) -> jax.Array:
    """An array that stays when the state is donated to the next step."""
    return step + 0


def steps_per_call(config: Config, dataset: Dataset, mesh: jax.sharding.Mesh) -> int:
    """The most steps that one call of a compiled program runs.

    Raises:
      UserError: the config asks for several, but the data are streamed.
    """
    asked = config.training.steps_per_call
    resident = is_resident(dataset.train, config.data, config.augmentation)
    if not resident and asked is not None and asked > 1:
        raise UserError(
            f"training.steps_per_call={asked} needs the training data on the devices, "
            "and they are streamed: set it to 1, or data.resident to true"
        )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return asked or (STEPS_PER_CALL if resident and not on_cpu else 1)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts or continues; a checkpoint holds it beside the state.

    Attributes:
      position: the global example index: how many examples were drawn before.
      rows: of metrics.jsonl so far.
      row_is_due: the run was stopped in the evaluation after the state's step.
      skipped: broken images replaced since the last row.
    """

    position: int = 0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    row_is_due: bool = False
    skipped: int = 0


def restored_state(
    learner: Learner,
    dataset: Any,
    checkpoints: Checkpoints,
    folder: Workdir,
    tell: Callable[[str], None],
) -> tuple[TrainState, Start] | None:
    """The newest whole checkpoint, if there is one.

    metrics.jsonl then holds exactly its rows: those written after the checkpoint belong
    to steps that will run again.
    """
    restored = checkpoints.restore_newest(
        learner.abstract_state(), warn=lambda text: tell(f"warning: {text}")
    )
    if restored is None:
        folder.write_rows([])
        return None
    state, content = restored
    if "data" in content:
        trained_on = Identity.from_json(content["data"])
        folder.refuse_other_data(dataset.identity, trained_on)
    names = {field.name for field in dataclasses.fields(Start)} & content.keys()
    start = Start(**{name: content[name] for name in names})
    folder.write_rows(start.rows)
    tell(f"continuing from the checkpoint at step {int(state.step)}")
    return state, start


def _first_state(
    learner: Learner, dataset: Dataset, tell: Callable[[str], None]
) -> TrainState:
    """The state before the first step, with the weights that the config names."""
    options, variables = learner.config.model, None
    if options.weights is not None:
        variables = load_weights(
            options.weights,
            learner.model,
            new_head=options.new_head,
            rng=jax.random.key(learner.config.seed),
            example=jax.ShapeDtypeStruct((1, *learner.image_shape), jax.numpy.float32),
            notify=tell,
        )
    statistics = pixel_statistics(learner.config, dataset, tell)
    return learner.fresh_state(statistics, variables)


@dataclasses.dataclass
class Run:
    """The steps of a run, and what is due between them.

    Training another kind of net overrides ``open``, ``training_batches``,
    ``next_call``, ``training_metrics``, ``evaluate`` and ``with_final_statistics``.
    """

    learner: Learner
    dataset: dataclasses.InitVar[Any]
    checkpoints: Checkpoints
    folder: Workdir
    progress: Progress
    stop: StopSignal
    start: Start
    trackers: Trackers

    def __post_init__(self, dataset: Any) -> None:
        config, folder = self.learner.config, self.folder
        self.config, self.derived = config, self.learner.derived
        self.identity = dataset.identity
        self.batch_size = self.derived.global_batch_size
        self.rows = list(self.start.rows)
        self.feeds: dict[str, Any] = {}
        self.resident: Any = None
        self.open(dataset)
        self.throughput = Throughput()
        mirror = functools.partial(folder.mirror, folder.profile)
        self.profile = Profile(mirror, config.profile.range)
        self.named_broken: set[str] = set()
        self.skipped_before = -self.start.skipped
        self.seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.began = time.perf_counter()

    def open(self, dataset: Any) -> None:
        """Opens the feeds by their split, and makes the step."""
        config, mesh = self.config, self.learner.mesh
        self.feeds = {
            split.name: make_feed(split, mesh, config.data, config.augmentation)
            for split in (dataset.train, dataset.holdout, dataset.test)
            if split is not None
        }
        self.resident = self.feeds["train"].resident
        self.evaluator = Evaluator(self.learner.model, mesh)
        self.steps_per_call = steps_per_call(config, dataset, mesh)
        self.one_step = make_train_step(self.learner)
        self.many_steps = make_train_steps(self.learner)

    def training_batches(self) -> Generator[Any]:
        """The batches from the start of the run on."""
        start, size, seed = self.start.position, self.batch_size, self.config.seed
        return self.feeds["train"].training_batches(start, size, seed)

    def next_call(
        self, step: int, batches: Iterator[Any]
    ) -> tuple[Callable[..., TrainState], Any, int]:
        """The program to call next, its batch, and the number of steps it runs."""
        length = call_length(self.next_due(step) - step, self.steps_per_call)
        if self.steps_per_call == 1:
            return self.one_step, next(batches), length
        feed, first = self.feeds["train"], step * self.batch_size
        assert isinstance(feed, ResidentFeed)
        seed = self.config.seed
        indices = feed.training_indices(first, length, self.batch_size, seed)
        return self.many_steps, indices, length

    def training_metrics(self, state: TrainState) -> dict[str, Any]:
        """The metrics of the steps since the last row."""
        sums = state.sums.summary()
        return {"train_loss": sums["loss"], "train_error": sums["error"]}

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """The metrics of the held-out and the test split.

        Raises:
          Interrupted: a signal came.
        """
        metrics: dict[str, Any] = {}
        for name, feed in self.feeds.items():
            if name == "train":
                continue
            summary = self.evaluator.evaluate(
                state.evaluation_variables(),
                state.statistics,
                feed,
                evaluation_batch_size(self.config, self.learner.mesh),
                interrupted=self.stop.asked,
            )
            metrics |= {f"{name}_{key}": value for key, value in summary.items()}
        return metrics

    def to_the_end(self, state: TrainState) -> list[dict[str, Any]]:
        """Runs the steps that are left; returns all rows of metrics.jsonl.

        Raises:
          Preempted: a signal stopped the run, and it has saved.
        """
        step, last, compiled = int(state.step), self.derived.steps, set[int]()
        batches, in_flight = self.training_batches(), parallel.InFlight()
        self.stop.agree_over(self.learner.mesh)
        with contextlib.closing(batches), contextlib.closing(self.profile):
            if self.start.row_is_due:
                state = self.after_step(state, step, saved=True)
            while step < last:
                self.profile.before(step + 1)
                # Feed: the next batch, or the indices of the next batches.
                with self.throughput.waiting():
                    train, batch, length = self.next_call(step, batches)
                # Step: one call, which the devices run while the host goes on.
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state = train(state, self.resident, batch)
                    parallel.settled(state)
                    in_flight.add(functools.partial(_copy, state.step))
                step += length
                if length in compiled:
                    self.throughput.count(length * self.batch_size)
                else:
                    # A program's first call compiles: no part of the speed.
                    compiled.add(length)
                    state.step.block_until_ready()
                    self.stop.steps_were_made()
                    self.progress.start(step, last)
                    self.throughput.restart()
                if self.profile.after(step, state):
                    self.progress.message(f"profile of steps: {self.folder.profile}")
                state = self.after_step(state, step)
        return self.rows

    def next_due(self, step: int) -> int:
        """The next step after which the host must act."""
        periods = [
            self.derived.log_every,
            self.derived.evaluate_every,
            self.derived.checkpoint_every,
        ]
        if self.config.tracking.images_every_steps is not None:
            periods.append(self.config.tracking.images_every_steps)
        due = [(step // period + 1) * period for period in periods]
        due += [end for end in self.profile.ends if end > step]
        return min(self.derived.steps, *due)

    def after_step(
        self, state: TrainState, step: int, saved: bool = False
    ) -> TrainState:
        """Does what is due after a step: a row of metrics, evaluation, a checkpoint.

        ``saved`` is true if a checkpoint of this step exists.
        """
        last = step == self.derived.steps
        saves = last or step % self.derived.checkpoint_every == 0
        # A checkpoint can be the best one only if it was evaluated.
        evaluates = last or step % self.derived.evaluate_every == 0
        evaluates = evaluates or (saves and self.config.checkpoint.best)
        reports = evaluates or step % self.derived.log_every == 0
        if reports:
            try:
                state = self._write_row(state, step, evaluates)
            except Interrupted:
                self._preempted(state, step, saved, row_is_due=True)
        self.trackers.add_pictures(step, state)
        if saves:
            # A checkpoint of an interrupted evaluation lacks the evaluation's row.
            self._save(state, step, replace=saved)
            saved = True
        if not last and self.stop.asked():
            self._preempted(state, step, saved)
        if reports or saves or self.trackers.pictures_are_due(step):
            self.throughput.restart()
        return state

    def _write_row(self, state: TrainState, step: int, evaluates: bool) -> TrainState:
        """Writes a row of metrics.jsonl; returns the state with its sums at zero."""
        self._refuse_bad_loss(state)
        row: dict[str, Any] = {
            "step": step,
            "epoch": step / self.derived.steps_per_epoch,
            "learning_rate": float(state.learning_rate),
            **self.training_metrics(state),
            **self.throughput.interval(),
        }
        if self.config.data.on_error == "skip":
            row["train_skipped"] = self._skipped()
        if evaluates:
            if step == self.derived.steps:
                state = self.with_final_statistics(state)
            row |= self.evaluate(state)
        new: dict[str, Any] = {"sums": state.sums.zeros()}
        if "holdout_error" in row:
            new["schedule"] = self.learner.schedule.after_evaluation(
                state.schedule, row["holdout_error"]
            )
        same = parallel.replicated(self.learner.mesh)
        state = dataclasses.replace(state, **parallel.place(jax.device_get(new), same))
        self.skipped_before += row.get("train_skipped", 0)
        row["seconds"] = self.seconds_before + time.perf_counter() - self.began
        self._name_broken_images()
        self.rows.append(row)
        self.folder.append_row(row)
        self.trackers.add(row)
        self.progress.show(row)
        return state

    def with_final_statistics(self, state: TrainState) -> TrainState:
        """Recomputes the batch statistics for the last weights, if the config asks."""
        examples = self.config.evaluation.precise_statistics_examples
        if not examples:
            return state
        batches = math.ceil(examples / self.batch_size)
        self.progress.message(f"recomputing batch statistics over {batches} batches")
        variables = precise_variables(
            self.learner.model,
            self.config,
            self.learner.mesh,
            state.evaluation_variables(),
            state.statistics,
            state.rng,
            self.feeds["train"],
            batches,
        )
        return state.with_evaluation_variables(variables)

    def _save(
        self, state: TrainState, step: int, *, replace: bool, row_is_due: bool = False
    ) -> None:
        self._refuse_bad_loss(state)
        start = Start(
            position=step * self.batch_size,
            rows=self.rows,
            row_is_due=row_is_due,
            skipped=self._skipped(),
        )
        content = dataclasses.asdict(start) | {
            "config": dataclasses.asdict(self.config),
            "data": dataclasses.asdict(self.identity),
        }
        row = self.rows[-1] if self.rows and self.rows[-1]["step"] == step else {}
        self.checkpoints.save(state, content, row.get("holdout_error"), replace)

    def _preempted(
        self, state: TrainState, step: int, saved: bool, row_is_due: bool = False
    ) -> NoReturn:
        if not saved:
            self._save(state, step, replace=False, row_is_due=row_is_due)
        self.checkpoints.wait()
        raise self.stop.preempted(step)

    def _refuse_bad_loss(self, state: TrainState) -> None:
        step = int(state.first_bad_step)
        if step >= 0:
            raise self.checkpoints.diverged(f"the loss is not finite at step {step}")

    def _skipped(self) -> int:
        """Broken images replaced since the last row, on all hosts."""
        if self.config.data.on_error != "skip":
            return 0
        total = distributed.sum_over_processes(len(self.feeds["train"].skipped))
        return total - self.skipped_before

    def _name_broken_images(self) -> None:
        """Names each skipped image once per run."""
        for feed in self.feeds.values():
            for sentence in feed.skipped:
                if sentence not in self.named_broken:
                    self.named_broken.add(sentence)
                    self.progress.message(f"warning: skipped: {sentence}")
