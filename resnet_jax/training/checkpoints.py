"""Checkpoints with Orbax: asynchronous, complete and checked when they are read.

A checkpoint is the state of the devices and, as JSON, all else that a run is: the
config, the position in the data and the metrics so far. Beside them stand checksums
of both, since a flipped bit on a disk is restored without a word otherwise.
"""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from resnet_jax import distributed
from resnet_jax.config.schema import CheckpointConfig
from resnet_jax.errors import UserError
from resnet_jax.storage import is_remote, storage_of
from resnet_jax.training.state import TrainState

Warn = Callable[[str], None]
_HOLDOUT_ERROR = "holdout_error"
_SAVE_SECONDS = 10**8
"""Orbax measures by the wall clock, and takes a save for hung when that jumps. For some
parts of a save its limit is a constant of its own, 300 s."""


class DivergedError(UserError):
    """A number of the state is not finite."""


class Checkpoints:
    """The checkpoints of a workdir; a context manager that waits for the last save."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        """Opens the folder, making it where it is missing.

        Args:
          directory: absolute path, or epath's.
          config: what to keep.
        """
        kept: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every_steps:
            kept.append(policies.EveryNSteps(config.keep_every_steps))
        if config.best:
            kept.append(
                policies.BestN(
                    get_metric_fn=_holdout_error,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._directory = directory
        self._keeps_best = config.best
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                # Without it Orbax does not write the metrics down; with it, it warns
                # of every checkpoint that has none.
                best_fn=_holdout_error if config.best else None,
                best_mode="min",
                async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        # A failed save comes up once more here; the first error is the one to tell.
        with contextlib.suppress(Exception) if error_type else self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one sentence that a save has failed, a full disk for example."""
        try:
            yield
        except Exception as error:
            # A store has errors of its own; on a disk the others are faults of ours.
            known = isinstance(error, (OSError, ValueError, RuntimeError))
            if not known and not is_remote(self._directory):
                raise
            if distributed.process_count() > 1 and distributed.is_lost_peer(error):
                raise
            reason = _reason(error)
            hint = "make room"
            if "timed out" in reason.lower():
                hint = "if the clock was not set forward meanwhile, look at the disk"
            raise UserError(
                f"a checkpoint cannot be written in {self._directory}: {reason}; "
                f"{hint}, and the same command goes on from the checkpoint before"
            ) from error

    def save(
        self,
        state: TrainState,
        content: dict[str, Any],
        holdout_error: float | None,
        replace: bool = False,
    ) -> None:
        """Begins to save; returns once the state's buffers may be donated.

        Args:
          state: of the devices.
          content: everything else, fit for JSON.
          holdout_error: of this state, if it was evaluated.
          replace: a checkpoint of this step is there, and this one takes its place.

        Raises:
          DivergedError: a parameter or statistic is not finite; nothing is saved.
        """
        step = int(state.step)
        host_state = _on_host(state)
        for name, leaf in host_state.items():
            if name.startswith((".params", ".batch_stats", ".opt_state")) and not (
                np.isfinite(leaf).all()
            ):
                raise DivergedError(f"{name} is not finite after step {step}")
        text = json.dumps(content)
        meta = {
            "content": text,
            "content_crc32": zlib.crc32(text.encode()),
            "state_crc32": {name: _crc32(leaf) for name, leaf in host_state.items()},
        }
        metrics = None if holdout_error is None else {_HOLDOUT_ERROR: holdout_error}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        )
        with self._writing():
            if replace:
                self._manager.delete(step)
            self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Waits until all that was saved is on the disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, increasing."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the lowest held-out error, if the config keeps it."""
        return self._manager.best_step() if self._keeps_best else None

    def restore(
        self, step: int, abstract_state: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and content of one checkpoint.

        Args:
          step: one of ``steps()``.
          abstract_state: shapes, dtypes and shardings to restore to.

        Raises:
          UserError: it is damaged.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
            meta, state = restored["meta"], restored["state"]
            text = meta["content"]
            content_is_whole = zlib.crc32(text.encode()) == meta["content_crc32"]
            failure = None
        except Exception as error:
            # Whatever stands in a damaged file may come up as any exception.
            failure = _reason(error)
        self._refuse_damaged(step, failure)
        changed = [
            name
            for name, leaf in _on_host(state).items()
            if meta["state_crc32"][name] != _crc32(leaf)
        ]
        if changed or not content_is_whole:
            failure = (
                f"{changed[0] if changed else 'its content'} differs from its checksum"
            )
        self._refuse_damaged(step, failure)
        return state, json.loads(text)

    def _refuse_damaged(self, step: int, failure: str | None) -> None:
        """Raises UserError on all processes where one has a ``failure``."""
        if distributed.sum_over_processes(failure is not None):
            raise UserError(
                f"checkpoint {self._directory / str(step)} is damaged: "
                f"{failure or 'another process cannot read it'}"
            )

    def restore_newest(
        self, abstract_state: TrainState, warn: Warn
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Damaged ones are named through ``warn`` and put aside, since their steps will
        be saved again.

        Raises:
          UserError: there are checkpoints and all are damaged.
        """
        steps = self.steps()
        damaged = []
        for step in reversed(steps):
            try:
                restored = self.restore(step, abstract_state)
            except UserError as error:
                warn(f"{error}; trying the one before it")
                damaged.append(step)
                continue
            for bad in damaged:
                self._put_aside(bad, warn)
            return restored
        if steps:
            raise UserError(
                f"all checkpoints in {self._directory} are damaged; give another "
                "workdir to start again, or delete this one"
            )
        return None

    def _put_aside(self, step: int, warn: Warn) -> None:
        source, target = (
            self._directory / str(step),
            self._directory / f"damaged-{step}",
        )
        if distributed.is_primary():
            storage_of(source).move(source, target)
        distributed.wait_for_all("put aside")
        self._manager.reload()
        warn(f"moved {source} to {target.name}; delete it when you have looked at it")


def _holdout_error(metrics: dict[str, float]) -> float:
    return metrics[_HOLDOUT_ERROR]


def _reason(error: Exception) -> str:
    """An error's first sentence, without TensorStore's inner details."""
    line = str(error).strip().split("\n")[0].split(" See full")[0]
    return line[:160] or type(error).__name__


def _on_host(state: Any) -> dict[str, np.ndarray]:
    """Path to array, whole on every process; keys of random numbers as their words."""

    def words(leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    def whole(leaf: jax.Array) -> jax.Array:
        # Parts of an array that lie on other hosts have to be fetched.
        here = leaf.is_fully_addressable or leaf.is_fully_replicated
        return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(words, state))
    values = jax.device_get([whole(leaf) for _, leaf in leaves])
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return dict(zip(names, values, strict=True))


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
