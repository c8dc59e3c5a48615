"""Where the curves of a run go, beside metrics.jsonl: TensorBoard, wandb, MLflow.

Only the primary process tracks. A tracker that fails costs one warning, never the run.
Services are called in a thread each, so that training never waits for an upload.
"""

import contextlib
import dataclasses
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from resnet_jax import distributed, parallel
from resnet_jax.analysis.batches import first_batch
from resnet_jax.data.dataset import Dataset
from resnet_jax.environment import how_to_install
from resnet_jax.errors import Preempted, UserError, printable
from resnet_jax.models.trees import unstack_blocks
from resnet_jax.training.state import Learner, TrainState
from resnet_jax.workdir import Workdir

FINISH_SECONDS = 30.0
"""How long the end of a run waits for a service."""
_BINS = 64
_NOT_CURVES = ("step", "seconds")

Histogram = tuple[np.ndarray, np.ndarray]
"""Counts int64 (n,) and edges float64 (n + 1,)."""
Ending = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """What each tracker takes. Steps never decrease between two starts."""

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics.jsonl."""

    def add_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Adds PNG files by name."""

    def add_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds histograms by name."""

    def add_result(self, result: dict[str, Any]) -> None:
        """Adds the content of result.json, at the end of a run."""


class Service(Tracker, Protocol):
    """A tracker that may be slow or fail: all calls come from one thread."""

    def start(self) -> None:
        """Connects, and adds the rows from before this start that are missing."""

    def finish(self, ending: Ending) -> None:
        """Waits until everything is stored."""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run, for its trackers.

    Attributes:
      folder: its workdir.
      config: of the run.
      rows: of metrics.jsonl, from before this start.
      step: the state's, at this start.
      tell: prints a sentence.
    """

    folder: Workdir
    config: Any
    rows: Sequence[dict[str, Any]]
    step: int
    tell: Callable[[str], None]

    @property
    def name(self) -> str:
        """The last two folders of the workdir, such as ``digits/seed-0``."""
        return "/".join(self.folder.path.parts[-2:])


def check_installed(config: Any) -> None:
    """Raises UserError if a tracker's package is missing; touches no device."""
    for name in config.tracking.trackers:
        # A run leaves a folder ``wandb`` behind: such a folder is not the package.
        spec = importlib.util.find_spec(name) if name != "tensorboard" else None
        if name != "tensorboard" and (spec is None or spec.origin is None):
            raise UserError(
                f"tracking.trackers names {name}, which is not installed; install it "
                f"with: {how_to_install(name)}"
            )


class Trackers:
    """All trackers of a run; a context manager."""

    def __init__(self, run: TrackedRun, learner: Learner, dataset: Dataset | None):
        """``learner`` makes histograms, and ``dataset`` images if it is given."""
        self._run, self._learner, self._dataset = run, learner, dataset
        self._trackers: list[Any] = []
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Trackers":
        if distributed.is_primary():
            for name in self._run.config.tracking.trackers:
                tracker = self._opened.enter_context(_make(name, self._run))
                self._trackers.append(tracker)
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics.jsonl."""
        for tracker in self._trackers:
            tracker.add(row)

    def add_result(self, result: dict[str, Any]) -> None:
        """Adds the content of result.json."""
        for tracker in self._trackers:
            tracker.add_result(result)

    def pictures_are_due(self, step: int) -> bool:
        """Whether ``add_pictures`` adds something after a step."""
        tracking = self._run.config.tracking
        every = tracking.images_every_steps
        return every is not None and step % every == 0 and bool(tracking.trackers)

    def add_pictures(self, step: int, state: TrainState) -> None:
        """Adds the step's batch and the parameters' histograms, if they are due.

        All processes call this: they gather parameters that are cut over devices.
        """
        if not self.pictures_are_due(step):
            return
        params, statistics = _gathered((state.params, state.statistics), self._learner)
        if not self._trackers:
            return
        params, statistics = jax.device_get((params, statistics))
        found = histograms(params)
        images = {}
        try:
            if self._dataset is not None:
                config = self._run.config
                batch = first_batch(config, self._dataset, statistics, step=step)
                images = {"batch": batch.png()}
        except UserError as error:
            self._run.tell(f"warning: no images for the trackers: {error}")
        for tracker in self._trackers:
            tracker.add_images(step, images)
            tracker.add_histograms(step, found)


def _gathered(tree: Any, learner: Learner) -> Any:
    """The arrays whole on each device; a copy only if they are cut."""
    if not learner.config.parallel.fully_sharded:
        return tree
    return jax.jit(lambda tree: parallel.gathered(tree, learner.mesh))(tree)


def histograms(params: Mapping[str, Any]) -> dict[str, Histogram]:
    """A histogram of each finite parameter array, by part and layer.

    Args:
      params: host arrays, of an unrolled or scanned net.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.histogram(
            np.asarray(leaf, np.float64), _BINS
        )
        for path, leaf in jax.tree.leaves_with_path(unstack_blocks(params))
        if np.isfinite(leaf).all()  # a run that diverges has others
    }


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's values by tag: ``test_error`` is ``error/test``, so that curves group."""
    return {_tag(name): v for name, v in row.items() if name not in _NOT_CURVES}


def _tag(name: str) -> str:
    split, _, metric = name.partition("_")
    return f"{metric}/{split}" if split in ("train", "holdout", "test") else name


def _make(name: str, run: TrackedRun) -> Any:
    """A tracker as a context manager. Its package is imported only if it is used."""
    if name == "tensorboard":
        from resnet_jax.training.tensorboard import TensorBoard

        return TensorBoard(run)
    if name == "wandb":
        return InBackground(name, _wandb, run)
    return InBackground(name, _mlflow, run)


def _wandb(run: TrackedRun) -> Service:
    from resnet_jax.training.wandb_tracker import Wandb

    return Wandb(run)


def _mlflow(run: TrackedRun) -> Service:
    from resnet_jax.training.mlflow_tracker import MLflow

    return MLflow(run)


class InBackground:
    """Calls a service in a thread of its own; a context manager.

    The end of the block waits ``FINISH_SECONDS`` for it.
    """

    def __init__(
        self, name: str, make: Callable[[TrackedRun], Service], run: TrackedRun
    ):
        """``make`` is called in the thread: importing a service takes seconds."""
        self._name, self._make, self._run = name, make, run
        self._calls: queue.SimpleQueue[Callable[[Service], None] | Ending]
        self._calls = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> "InBackground":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind is not None and issubclass(kind, (Preempted, KeyboardInterrupt))
        self._calls.put("stopped" if stopped else "failed" if kind else "finished")
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive() and not self._over.is_set():
            self._over.set()
            self._warn(f"it did not take everything within {FINISH_SECONDS:g} s")

    def add(self, row: dict[str, Any]) -> None:
        """See ``Tracker``; so do the others."""
        row = dict(row)
        self._call(lambda service: service.add(row))

    def add_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """See ``Tracker``."""
        self._call(lambda service: service.add_images(step, images))

    def add_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See ``Tracker``."""
        self._call(lambda service: service.add_histograms(step, histograms))

    def add_result(self, result: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._call(lambda service: service.add_result(result))

    def _call(self, call: Callable[[Service], None]) -> None:
        if not self._over.is_set():
            self._calls.put(call)

    def _work(self) -> None:
        try:
            service = self._make(self._run)
            service.start()
            while not isinstance(call := self._calls.get(), str):
                call(service)
            service.finish(call)
        except Exception as error:  # whatever a service's library raises
            if not self._over.is_set():
                self._over.set()
                self._warn(str(error) or type(error).__name__)

    def _warn(self, reason: str) -> None:
        line = printable(" ".join(reason.split()))
        line = line if len(line) <= 200 else f"{line[:200]} ..."
        self._run.tell(
            f"warning: {self._name} lacks the newest rows of this run ({line}); "
            "metrics.jsonl has them all, and training is not affected"
        )
