"""The processes of one run on several hosts: how they connect, and how they end.

jax.distributed connects the processes, and its coordination service knows which are
alive. This module adds: if a process dies, the others soon stop with one sentence that
names it, instead of waiting in a collective forever.
"""

import contextlib
import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from resnet_jax.errors import Preempted, UserError
from resnet_jax.signals import exit_now

_POLL_SECONDS = (0.5, 5.0)
_START_SECONDS = 300
_LOST = ("Gloo", "NCCL", "arrier", "oordination", "Socket closed", "Connection reset")
_RESTART = "The checkpoints are whole: the same command on all hosts resumes the run"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
      coordinator: ``HOST:PORT`` of process 0. If all three are None, jax reads them
        from the environment of a cluster.
      count: number of processes.
      index: of this process, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def check(self) -> None:
        """Raises UserError if the three do not fit together."""
        if self == Processes():
            return
        if self.coordinator is None or self.count is None or self.index is None:
            raise UserError(
                "--coordinator, --processes and --process-id go together; give all "
                "three, or --distributed on a cluster that jax knows"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                "--coordinator must be HOST:PORT of process 0, such as 10.0.0.1:8476, "
                f"not {self.coordinator!r}"
            )
        if self.count < 1:
            raise UserError(f"--processes must be at least 1, not {self.count}")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process-id must be one of 0 to {self.count - 1}, not {self.index}"
            )


def is_primary() -> bool:
    """Whether this process writes the files of the run.

    Touches no device unless the run has several processes; so do the functions below.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_count() -> int:
    """Number of processes of the run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(value: int) -> int:
    """The value of process 0, on all processes."""
    if process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def sum_over_processes(value: int) -> int:
    """The sum of the values of all processes, on all processes."""
    if process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).sum())


def gather(texts: Sequence[str]) -> list[str]:
    """The texts of all processes, on all processes."""
    if process_count() == 1:
        return list(texts)
    own = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
    length = int(multihost_utils.process_allgather(np.int32(len(own))).max())
    padded = np.full(length, ord(" "), np.uint8)
    padded[: len(own)] = own
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [text for row in gathered for text in json.loads(row.tobytes())]


def wait_for_all(name: str) -> None:
    """Waits until every process has called this with the same name."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective or barrier failed, most likely because a process died."""
    return any(word in str(error) for word in _LOST)


@contextlib.contextmanager
def started(processes: Processes | None, peer_timeout_seconds: int) -> Iterator[None]:
    """Connects this process with the others, and watches them until the block ends.

    Call it before anything uses a device. If a process dies or stops with an error,
    every other one ends with exit status 1 and a sentence that names it.

    Args:
      processes: None if this process is alone; then nothing happens.
      peer_timeout_seconds: without a heartbeat for this long, a process counts as dead.

    Raises:
      UserError: the processes cannot be connected.
    """
    if processes is None:
        yield
        return
    _initialize(processes, peer_timeout_seconds)
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch(peer_timeout_seconds)
    try:
        yield
    except (UserError, KeyboardInterrupt):
        watch.leave_alone()
        raise
    except Preempted:
        watch.leave_together()
        raise
    except Exception:
        # A collective may fail before the watch knows which process has died.
        watch.wait()
        raise
    else:
        watch.leave_together()
    finally:
        watch.close()


def _initialize(processes: Processes, peer_timeout_seconds: int) -> None:
    processes.check()
    # Otherwise jax aborts all processes with a stack trace when one dies.
    jax.config.update("jax_enable_recoverability", True)
    # training.stopping handles SIGTERM, and agrees on a step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=peer_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"the processes of the run cannot be connected: {reason}; give each the "
            "same --coordinator HOST:PORT and --processes N, and its own --process-id "
            "from 0 to N - 1"
        ) from error


class _Watch:
    """A thread that asks jax which processes are alive, and exits if one died."""

    def __init__(self, peer_timeout_seconds: int):
        low, high = _POLL_SECONDS
        self._interval = min(max(peer_timeout_seconds / 10, low), high)
        self._timeout = peer_timeout_seconds
        self._index, self._count = jax.process_index(), jax.process_count()
        self._leaving = threading.Event()
        self._last_words = None if self._index == 0 else self._say_if_aborted()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _say_if_aborted(self) -> subprocess.Popen[bytes]:
        """A shell that prints a sentence if this process dies without closing a pipe.

        jaxlib aborts a process that loses process 0, and no Python code runs then.
        """
        sentence = (
            f"resnet-jax: error: process 0 of {self._count}, the coordinator, has died "
            f"or cannot be reached, or process {self._index} was killed; see the "
            f"output of both. {_RESTART}"
        )
        return subprocess.Popen(
            ["sh", "-c", 'read -r _ || echo "$0" >&2', sentence],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Gives the thread time to find out who died. It then ends this process."""
        self._thread.join(2 * self._timeout)

    def leave_alone(self) -> None:
        """Stops watching: the others will see this process go."""
        self._leaving.set()
        if self._index == 0:
            # The service ends with this process. Others that fail with the same error
            # can print it first.
            time.sleep(3 * self._interval)

    def leave_together(self) -> None:
        """Disconnects when all processes are here; process 0 goes last."""
        wait_for_all("end")
        self._leaving.set()
        # A process that leaves while another still watches would count as dead.
        wait_for_all("watch ended")
        if self._index == 0:
            with contextlib.suppress(Exception):
                while len(_dead()) < self._count - 1:
                    pass
        jax.distributed.shutdown()

    def close(self) -> None:
        """Ends the shell without its sentence."""
        if self._last_words is not None:
            with contextlib.suppress(BrokenPipeError):
                self._last_words.communicate(b"\n")

    def _run(self) -> None:
        while not self._leaving.wait(self._interval):
            try:
                dead = _dead()
            except Exception:
                # Process 0 does not answer: jaxlib or the main thread ends this one.
                return
            if dead and not self._leaving.is_set():
                names = ", ".join(map(str, sorted(dead)))
                self.close()
                exit_now(
                    f"error: process {names} of {self._count} has stopped, died or "
                    f"cannot be reached; see its own output. {_RESTART}",
                    status=1,
                )


def _dead() -> set[int]:
    """The dead processes. Returns when every living process has asked."""
    try:
        with multihost_utils.live_devices(jax.devices()) as living:
            pass
    except multihost_utils.ProcessFailureError as error:
        return {device.process_index for device in error.failed_devices}
    return set(range(jax.process_count())) - {d.process_index for d in living}
