"""Checkpoints, written by Orbax in the background and checked when they are read.

A checkpoint has two items. ``state`` is the ``TrainState``. ``meta`` is JSON: the rest
of the run (config, position in the data, metrics so far), and the shape, dtype and a
checksum of every array, because Orbax restores a flipped bit without an error.

1. ``save`` computes checksums on the devices and refuses a state that is not finite.
2. Orbax copies the state to the host and writes it while training continues.
3. ``restore_newest`` reads the newest checkpoint. One whose arrays have other shapes
   belongs to another run and is refused. One that differs from its checksums is
   damaged, and the one before it is read.
"""

import contextlib
import inspect
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from resnet_jax import distributed, parallel
from resnet_jax.config.schema import CheckpointConfig
from resnet_jax.errors import UserError
from resnet_jax.storage import is_remote, storage_of

Warn = Callable[[str], None]
Content = dict[str, Any]
_SAVE_SECONDS = 10**8
"""Orbax measures time by the wall clock and gives up on a save if the clock jumps."""


class DivergedError(UserError):
    """The loss or the state is not finite."""


class DamagedError(UserError):
    """The files of a checkpoint are not what was written."""


class Checkpoints:
    """The checkpoints of a run; a context manager that waits for the last save."""

    def __init__(self, directory: Path, config: CheckpointConfig, clean: bool = False):
        """Opens the folder and creates it if it is missing.

        Args:
          directory: absolute path, or an epath URL.
          config: which checkpoints to keep.
          clean: delete what killed saves left; for the process that saves.
        """
        kept: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every_steps:
            kept.append(policies.EveryNSteps(config.keep_every_steps))
        if config.best:
            kept.append(_KeepBest(self))
        self._directory = directory
        self._keeps_best = config.best
        self._holdout_errors: dict[int, float] = {}
        self._unknown: dict[int, DamagedError] = {}
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=clean,
                async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
            ),
        )
        self._read_holdout_errors()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        # A failed save is raised again here; report only the first error.
        with contextlib.suppress(Exception) if error_type else self._writing():
            self._manager.close()

    def save(
        self,
        state: Any,
        content: Content,
        holdout_error: float | None,
        replace: bool = False,
    ) -> None:
        """Starts a save; returns when the state's buffers can be donated.

        Args:
          state: the ``TrainState``.
          content: the rest of the run, as JSON values.
          holdout_error: of this state, if it was evaluated.
          replace: overwrite the checkpoint of this step.

        Raises:
          DivergedError: a parameter or statistic is not finite; nothing is saved.
        """
        step = int(state.step)
        checksums, finite = _checksums(state)
        checked = (".params", ".batch_stats", ".opt_state")
        for name, is_finite in finite.items():
            if not is_finite and name.startswith(checked):
                raise self.diverged(f"{name} is not finite after step {step}")
        content = content | {"arrays": _descriptions(state)}
        self._holdout_errors.pop(step, None)
        if holdout_error is not None:
            content["holdout_error"] = self._holdout_errors[step] = holdout_error
        text = json.dumps(content)
        crc32 = zlib.crc32(text.encode())
        meta = {"content": text, "content_crc32": crc32, "checksums": checksums}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(_one_copy, state)),
            meta=ocp.args.JsonSave(meta),
        )
        with self._writing():
            if replace:
                self._manager.delete(step)
            self._manager.save(step, args=items)

    def diverged(self, what: str) -> DivergedError:
        """The error to raise, which names the last good checkpoint."""
        self.wait()
        kept = "there is no checkpoint yet"
        if steps := self.steps():
            kept = f"the last good checkpoint is step {steps[-1]}"
        return DivergedError(
            f"{what}; {kept} in {self._directory}. Lower optimizer.learning_rate or "
            "add a warm-up, in another workdir"
        )

    def wait(self) -> None:
        """Waits until every save is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in increasing order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest held-out error, if the config keeps it.

        Raises:
          DamagedError: a checkpoint is, so its error is not known.
        """
        for error in self._unknown.values():
            raise error
        return self.best_of(self.steps()) if self._keeps_best else None

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The step with the lowest held-out error; the last of equal ones."""
        known = [step for step in steps if step in self._holdout_errors]
        return min(known, key=lambda s: (self._holdout_errors[s], -s), default=None)

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._manager.reload()
        self._read_holdout_errors()

    def _read_holdout_errors(self) -> None:
        self._holdout_errors, self._unknown = {}, {}
        for step in self.steps() if self._keeps_best else ():
            try:
                content, _ = self._read_meta(step)
            except DamagedError as error:
                if (self._directory / str(step)).exists():
                    self._unknown[step] = error
                continue
            rows = content.get("rows") or [{}]  # of version 0.1.0
            last = rows[-1] if rows[-1].get("step") == step else {}
            holdout_error = content.get("holdout_error", last.get("holdout_error"))
            if holdout_error is not None:
                self._holdout_errors[step] = holdout_error

    def shapes(self, step: int) -> Any:
        """Shapes and dtypes of the saved state, as nested dictionaries.

        Raises:
          DamagedError: the checkpoint is damaged.
        """
        content, _ = self._read_meta(step)
        failure = None
        try:
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                tree = handler.metadata(self._directory / str(step) / "state").tree
            found = _descriptions(tree)
            if found != content.get("arrays", found):
                failure = "its list of arrays differs from its checksum"
        except Exception as error:  # A damaged file can raise anything.
            failure = _reason(error)
        self._refuse_damaged(step, failure)
        return tree

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Content]:
        """The state and content of one checkpoint.

        Args:
          step: one of ``steps()``.
          abstract_state: shapes, dtypes and shardings of a ``TrainState``, or a
            dictionary with some of its fields; only those are read.

        Raises:
          DamagedError: the checkpoint is damaged.
          UserError: its arrays have other names, shapes or dtypes.
        """
        content, meta = self._read_meta(step)
        content.pop("holdout_error", None)
        saved = content.pop("arrays", None)
        if saved is not None:
            self._refuse_other_arrays(step, saved, abstract_state)
        failure = None
        _silence_abandoned_reads()
        try:
            how = ocp.checkpoint_utils.construct_restore_args(abstract_state)
            arguments = ocp.args.PyTreeRestore(
                item=abstract_state, restore_args=how, partial_restore=True
            )
            items = ocp.args.Composite(state=arguments)
            state = self._manager.restore(step, args=items)["state"]
            # What Orbax does not find stays abstract.
            for path, leaf in jax.tree.leaves_with_path(state):
                if not isinstance(leaf, jax.Array):
                    failure = f"{_name(jax.tree_util.keystr(path))} is missing"
        except Exception as error:  # A damaged file can raise anything.
            failure = _reason(error)
        self._refuse_damaged(step, failure)
        self._refuse_damaged(step, _difference(state, meta))
        return state, content

    def restore_newest(
        self, abstract_state: Any, warn: Warn
    ) -> tuple[Any, Content] | None:
        """The newest checkpoint that is whole, or None if there are no checkpoints.

        Damaged ones are named through ``warn`` and moved aside, because their steps
        will be saved again.

        Raises:
          UserError: every checkpoint is damaged, or the newest whole one belongs to
            another run.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                restored = self.restore(step, abstract_state)
            except DamagedError as error:
                warn(f"{error}; trying the one before it")
                damaged.append(step)
                continue
            for bad in damaged:
                self._move_aside(bad, warn)
            return restored
        if steps:
            raise UserError(
                f"all checkpoints in {self._directory} are damaged; give another "
                "workdir to start again, or delete this one"
            )
        return None

    def _read_meta(self, step: int) -> tuple[Content, Content]:
        """The content of a checkpoint, compared with its checksum, and all of meta."""
        failure = None
        try:
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self._manager.restore(step, args=items)["meta"]
            content = json.loads(meta["content"])
            if zlib.crc32(meta["content"].encode()) != meta["content_crc32"]:
                failure = "its content differs from its checksum"
        except Exception as error:  # A damaged file can raise anything.
            failure = _reason(error)
        self._refuse_damaged(step, failure)
        return content, meta

    def _refuse_damaged(self, step: int, failure: str | None) -> None:
        """Raises DamagedError on all processes if one of them has a ``failure``."""
        if distributed.sum_over_processes(failure is not None):
            reason = failure or "another process cannot read it"
            path = self._directory / str(step)
            raise DamagedError(f"checkpoint {path} is damaged: {reason}")

    def _refuse_other_arrays(
        self, step: int, saved: dict[str, str], abstract_state: Any
    ) -> None:
        wanted = _descriptions(abstract_state)
        extra = saved.keys() - wanted.keys()
        if isinstance(abstract_state, dict):  # some fields of a state
            extra = set()
        for name in sorted(wanted.keys() | extra):
            here, there = wanted.get(name, "absent"), saved.get(name, "absent")
            if here != there:
                raise UserError(
                    f"checkpoint {self._directory / str(step)} belongs to another "
                    f"run: {name[1:]} is {there} in it and {here} in this run; start "
                    "with the config, the data and the jax settings (such as "
                    "JAX_ENABLE_X64) of that run, or give another workdir"
                )

    def _move_aside(self, step: int, warn: Warn) -> None:
        source = self._directory / str(step)
        target = self._directory / f"damaged-{step}"
        if distributed.is_primary():
            storage_of(source).move(source, target)
        distributed.wait_for_all("moved aside")
        self._manager.reload()
        warn(f"moved {source} to {target.name}; delete it when you have looked at it")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failed save, such as a full disk, into one sentence."""
        try:
            yield
        except Exception as error:
            # Stores raise errors of many types; on a disk, others than these are bugs.
            known = isinstance(error, (OSError, ValueError, RuntimeError))
            if not known and not is_remote(self._directory):
                raise
            if distributed.process_count() > 1 and distributed.is_lost_peer(error):
                raise
            reason = _reason(error)
            hint = "make room"
            if "timed out" in reason.lower():
                hint = "check the disk, unless the clock was set forward"
            raise UserError(
                f"a checkpoint cannot be written in {self._directory}: {reason}; "
                f"{hint}, and the same command continues from the checkpoint before"
            ) from error


class _KeepBest:
    """Orbax's policy for the checkpoint with the lowest held-out error.

    Orbax's own one stores errors in a file without a checksum.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Whether to keep each of the checkpoints."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self._checkpoints.best_of(steps)
        return [step == best for step in steps]


def _silence_abandoned_reads() -> None:
    """Keeps Python from printing the errors of reads that nobody waits for.

    When one read fails, Orbax abandons the others. They may fail too, and each would
    print a traceback when its coroutine or task is freed.
    """
    logging.getLogger("asyncio").addFilter(_is_awaited)
    print_error = sys.unraisablehook
    if getattr(print_error, "__module__", None) == __name__:
        return

    def hook(error: Any) -> None:
        read = error.object
        abandoned = inspect.iscoroutine(read) and "orbax" in read.cr_code.co_filename
        if not abandoned and "Event loop is closed" not in str(error.exc_value):
            print_error(error)

    sys.unraisablehook = hook


def _is_awaited(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio is not about an abandoned read."""
    message = record.getMessage()
    abandoned = "exception was never retrieved" in message
    return not (abandoned and ("orbax" in message or "tensorstore" in message))


def _one_copy(leaf: jax.Array) -> jax.Array:
    """One device's copy of a leaf that is replicated over a process's devices.

    Given the replicated leaf, Orbax would cut it and write a part from each device.
    For hundreds of small arrays, the cutting takes seconds.
    """
    if distributed.process_count() == 1 and leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf


def _reason(error: Exception) -> str:
    """The first sentence of an error, without TensorStore's details."""
    line = str(error).strip().split("\n")[0].split(" See full")[0]
    return line[:160] or type(error).__name__


def _difference(state: Any, meta: Content) -> str | None:
    """How a restored state differs from its checksums, if it does."""
    if "state_crc32" in meta:  # Written by version 0.1.0.
        stored = meta["state_crc32"]
        found = {name: _crc32(leaf) for name, leaf in _leaves(state).items()}
    else:
        stored, found = meta.get("checksums"), _checksums(state)[0]
    if not isinstance(stored, dict):
        return "it has no checksums"
    saved = {_name(path): checksum for path, checksum in stored.items()}
    for name, checksum in found.items():
        if saved.get(name) != checksum:
            return f"{name} differs from its checksum"
    return None


def _descriptions(state: Any) -> dict[str, str]:
    """Dtype and shape of every array by name, such as ``float32[3,3,16,16]``.

    ``state`` holds arrays, abstract ones, or Orbax's metadata of them. A random key
    counts as its words.
    """

    def describe(leaf: Any) -> str:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{np.dtype(leaf.dtype)}[{','.join(map(str, leaf.shape))}]"

    leaves = jax.tree.leaves_with_path(state)
    return {_name(jax.tree_util.keystr(path)): describe(leaf) for path, leaf in leaves}


def _leaves(state: Any) -> dict[str, jax.Array]:
    """The arrays of a state by name, such as ``.params.head.bias``.

    Random keys are given as their words.
    """

    def words(leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    leaves = jax.tree.leaves_with_path(state)
    return {_name(jax.tree_util.keystr(path)): words(leaf) for path, leaf in leaves}


def _name(path: str) -> str:
    """A leaf's name, the same in dataclasses and dictionaries: .params.head.bias."""
    return re.sub(r"\['?(.*?)'?\]", r".\1", path)


def _checksums(state: Any) -> tuple[dict[str, int], dict[str, bool]]:
    """The checksum of every array, and whether all its numbers are finite.

    Both are computed where the array is stored: a state that is cut over devices or
    hosts is neither gathered nor copied.
    """
    leaves = _leaves(state).items()
    found = {name: parallel.settled(_checksum(leaf)) for name, leaf in leaves}
    found = jax.device_get(found)
    checksums = {name: int(checksum) for name, (checksum, _) in found.items()}
    return checksums, {name: bool(finite) for name, (_, finite) in found.items()}


@jax.jit
def _checksum(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A 32-bit hash of the bits and their places, and whether all is finite.

    The hash is a sum of mixed words modulo 2^32. It does not depend on the order of
    summation, so every sharding of an array has the same hash.
    """
    finite = jnp.isfinite(array).all()
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mix(words ^ _mix(index + np.uint32(0x9E3779B9)))
    return mixed.sum(dtype=jnp.uint32), finite


def _mix(x: jax.Array) -> jax.Array:
    """Spreads every bit of a word over all its bits (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _crc32(array: jax.Array) -> int:
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return zlib.crc32(np.ascontiguousarray(jax.device_get(array)).tobytes())
