"""The processes of one run on several hosts: how they start, end, and find each other.

jax.distributed does the work: it connects the processes, its coordination service
notices which of them live, and XLA's collectives move the numbers. This module adds
what a person needs: a process that dies makes the others stop, soon, with one sentence
that names it, where they would wait in a collective for ever.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from resnet_jax.errors import Preempted, UserError

_NOTICES = "resnet_jax/stopped"
_POLL_SECONDS = (0.5, 5.0)
_START_SECONDS = 300
_LOST = ("Gloo", "NCCL", "arrier", "oordination", "Socket closed", "Connection reset")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which processes make a run.

    Attributes:
      coordinator: ``HOST:PORT`` of process 0; None: jax finds it in a cluster's
        environment, as it does the rest.
      count: of processes.
      index: of this one, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def check(self) -> None:
        """Raises UserError where the three do not fit together."""
        if self == Processes():
            return
        if self.coordinator is None or self.count is None or self.index is None:
            raise UserError(
                "--coordinator, --processes and --process-id go together; give all, or "
                "--distributed where the cluster says them"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"the coordinator is HOST:PORT of process 0, such as 10.0.0.1:8476, "
                f"not {self.coordinator!r}"
            )
        if self.count < 1:
            raise UserError(f"the processes must be at least 1, not {self.count}")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"the process id is one of 0 to {self.count - 1}, not {self.index}"
            )


def is_primary() -> bool:
    """Whether this process writes what a run leaves; uses no device in a lone one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_count() -> int:
    """Processes of the run; uses no device in a lone one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(value: int) -> int:
    """The first process's value on all of them."""
    if process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def sum_over_processes(value: int) -> int:
    """The sum of the processes' values on all of them."""
    if process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).sum())


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective or barrier failed, most likely since a process died."""
    return any(word in str(error) for word in _LOST)


@contextlib.contextmanager
def started(processes: Processes | None, peer_timeout_seconds: int) -> Iterator[None]:
    """Connects this process with the others, and watches them meanwhile.

    Call it before anything uses a device. A process that dies, or stops for an error,
    makes every other one end with exit status 1 and a sentence that names it.

    Args:
      processes: None for a process alone, for which nothing happens.
      peer_timeout_seconds: without a sign of life after which a process counts as
        dead.

    Raises:
      UserError: the processes cannot be connected.
    """
    if processes is None:
        yield
        return
    _initialize(processes, peer_timeout_seconds)
    watch = _Watch(peer_timeout_seconds)
    try:
        yield
    except UserError as error:
        watch.tell(str(error))
        raise
    except KeyboardInterrupt:
        watch.tell("it was interrupted")
        raise
    except Preempted:
        watch.leave_together()
        raise
    except Exception as error:
        # A collective fails here before the watch knows which process has died.
        watch.name_the_dead(str(error))
        raise
    else:
        watch.leave_together()


def _initialize(processes: Processes, peer_timeout_seconds: int) -> None:
    processes.check()
    # Without it, jax aborts all processes with a stack trace where one dies.
    jax.config.update("jax_enable_recoverability", True)
    # training.stopping hears SIGTERM, and agrees on a step.
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
            f"the processes of the run cannot be connected: {reason}; give the same "
            "--coordinator HOST:PORT and --processes N to each, and --process-id from "
            "0 to N - 1"
        ) from error


class _Watch:
    """A thread that asks jax's coordination service which processes live."""

    def __init__(self, peer_timeout_seconds: int):
        low, high = _POLL_SECONDS
        self._interval = min(max(peer_timeout_seconds / 10, low), high)
        self._timeout = peer_timeout_seconds
        # jax has no public name for its client, which orbax uses as well.
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        self._coordinator = distributed.global_state.coordinator_address
        self._index, self._count = jax.process_index(), jax.process_count()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._count > 1:
            self._abort_in_one_sentence()
            self._thread.start()

    def tell(self, sentence: str) -> None:
        """Tells the other processes why this one stops."""
        if self._count == 1:
            return
        self._leaving.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_NOTICES}/{self._index}", sentence)
        if self._index == 0:
            # The service lives here: the others have to read it before it goes.
            time.sleep(3 * self._interval)

    def name_the_dead(self, what: str) -> None:
        """Gives the thread the time to find out who died; it then ends the process."""
        if self._count > 1:
            self._thread.join(2 * self._timeout)
            self.tell(what.split("\n")[0])

    def leave_together(self) -> None:
        """Disconnects once all processes are here; the first one goes last."""
        wait_for_all("end")
        self._leaving.set()
        # Nobody goes while another's thread still takes that for a death.
        wait_for_all("watch ended")
        if self._index == 0:
            with contextlib.suppress(Exception):
                while set(self._living()) != {0}:
                    pass
        jax.distributed.shutdown()

    def _living(self) -> Collection[int]:
        """Processes that live; answers once all of these have asked."""
        return self._client.get_live_nodes(list(range(self._count)))

    def _run(self) -> None:
        while not self._leaving.wait(self._interval):
            try:
                notices = self._client.key_value_dir_get(_NOTICES)
                living = self._living()
            except Exception:
                # Whatever jaxlib raises, the service does not answer.
                if not self._leaving.is_set():
                    _end(self._lost_coordinator())
                return
            if self._leaving.is_set():
                return
            for key, sentence in notices:
                index = key.rpartition("/")[2]
                if int(index) != self._index:
                    # It leaves in order while the service is still there.
                    time.sleep(3 * self._interval if self._index == 0 else 0)
                    _end(f"process {index} stopped: {sentence}")
            dead = sorted(set(range(self._count)) - set(living))
            if dead:
                names = ", ".join(map(str, dead))
                _end(
                    f"process {names} of {self._count} has died or cannot be reached; "
                    "see its own output. The checkpoints are whole: the same command "
                    "on all hosts goes on"
                )

    def _lost_coordinator(self) -> str:
        return (
            f"process 0 of {self._count}, the coordinator at {self._coordinator}, has "
            "died or cannot be reached; see its own output. The checkpoints are whole: "
            "the same command on all hosts goes on"
        )

    def _abort_in_one_sentence(self) -> None:
        """Jaxlib aborts a process that loses the coordinator; says so in a sentence."""
        if self._index == 0:
            return

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def on_abort(_: int) -> None:
            _end(self._lost_coordinator())

        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
        self._on_abort = on_abort  # C holds no reference


def _end(sentence: str) -> NoReturn:
    """Ends the process from any thread: the main one may wait in a collective."""
    sys.stdout.flush()
    print(f"resnet-jax: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
