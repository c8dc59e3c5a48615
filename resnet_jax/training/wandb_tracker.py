"""Weights & Biases: one run for each workdir, however often it is started."""

import contextlib
import dataclasses
import io
import secrets
import time
from collections.abc import Mapping
from typing import Any

import PIL.Image
import wandb

from resnet_jax.errors import UserError
from resnet_jax.training.tracking import (
    FINISH_SECONDS,
    Ending,
    Histogram,
    TrackedRun,
    curves,
)

RECORD = "wandb.json"
"""In the workdir: the run's id, and the last step that was logged."""
_COPY_SECONDS = 30.0
_EXIT_STATUS = {"finished": 0, "stopped": 255, "failed": 1}


class Wandb:
    """See ``tracking.Service``. WANDB_MODE, WANDB_ENTITY and so on apply.

    wandb's own files are in the workdir's folder ``wandb``, which ``wandb sync`` reads
    after a run without a network.
    """

    def __init__(self, run: TrackedRun):
        """Connects nothing yet."""
        self._tracked, self._opened = run, contextlib.ExitStack()
        self._copied_at, self._step = time.monotonic(), -1

    def start(self) -> None:
        """See ``Service``.

        Raises:
          UserError: nobody is logged in.
          wandb.Error: the server cannot be reached.
        """
        run, folder = self._tracked, self._tracked.folder
        record = folder.read_json(RECORD, {"id": "a text", "step": "a number"})
        record = record or {"id": secrets.token_hex(8), "step": -1}
        self._id = record["id"]
        folder.write_json(RECORD, record)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=FINISH_SECONDS,
            finish_timeout=FINISH_SECONDS - 5,
            finish_timeout_raises=True,
            reinit="create_new",
        )
        online = wandb.setup(settings).settings.mode not in ("offline", "disabled")
        # Without this, wandb would ask for a key in the middle of the run.
        if online and wandb.run is None and not wandb.login(prompt=False):
            raise UserError("no API key: call `wandb login`, or set WANDB_MODE=offline")
        self._mirror = self._opened.enter_context(folder.mirror(folder.path))
        self._run = wandb.init(
            project=run.config.tracking.project,
            id=self._id,
            name=run.name,
            resume="allow",
            dir=self._mirror.path,
            config=dataclasses.asdict(run.config),
            settings=settings,
        )
        self._run.config.update(dataclasses.asdict(run.config), allow_val_change=True)
        # The server knows the last step; without one, the workdir does.
        known = record["step"] if self._run.offline else self._run.step - 1
        self._last = int(known)
        for row in run.rows:
            self.add(row)
        if self._run.offline:
            run.tell(
                f"wandb: offline; send it with wandb sync {folder.path}/wandb/off*"
            )
        elif self._run.url is not None:
            run.tell(f"wandb: {self._run.url}")

    def add(self, row: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._log(row["step"], curves(row))

    def add_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """See ``Tracker``."""
        opened = {
            name: wandb.Image(PIL.Image.open(io.BytesIO(png)))
            for name, png in images.items()
        }
        self._log(step, opened)

    def add_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See ``Tracker``."""
        made = {
            f"parameters/{name}": wandb.Histogram(np_histogram=histogram)
            for name, histogram in histograms.items()
        }
        self._log(step, made)

    def add_result(self, result: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._run.summary.update(result)

    def finish(self, ending: Ending) -> None:
        """See ``Service``."""
        self._run.finish(exit_code=_EXIT_STATUS[ending])
        self._keep()
        self._opened.close()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """Logs what belongs to a step; an earlier start has logged steps up to _last.

        Calls for the same step make one entry.
        """
        if step <= self._last:
            return
        self._run.log(values, step=step)
        self._step = step
        copies = self._mirror.path != self._tracked.folder.path
        if not copies or time.monotonic() - self._copied_at > _COPY_SECONDS:
            with contextlib.suppress(FileNotFoundError):  # wandb has just moved a file
                self._keep()

    def _keep(self) -> None:
        """Notes the last step. In a store, first copies what wandb wrote offline."""
        if self._run.offline:
            self._mirror.copy()
        self._copied_at = time.monotonic()
        step = max(self._last, self._step)
        self._tracked.folder.write_json(RECORD, {"id": self._id, "step": step})
