"""MLflow: one run for each workdir, however often it is started."""

import contextlib
import io
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import PIL.Image
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from resnet_jax.config import flatten
from resnet_jax.training.tracking import Ending, Histogram, TrackedRun, curves

RECORD = "mlflow.json"
"""In the workdir: the run's id."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_METRICS, _MOST_PARAMS = 1000, 100
"""In one request, as MLflow's protocol says."""
_MOST_CHARACTERS = 6000
"""Of a parameter's value, as MLflow's protocol says."""


class MLflow:
    """See ``tracking.Service``. The store is MLflow's own choice: MLFLOW_TRACKING_URI.

    If the store lacks the run of an earlier start, a new run gets all rows.
    """

    def __init__(self, run: TrackedRun):
        """Connects nothing yet."""
        self._tracked = run
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def start(self) -> None:
        """See ``Service``; raises MlflowException if the store cannot be reached."""
        folder = self._tracked.folder
        self._client = MlflowClient()
        record = folder.read_json(RECORD, {"id": "a text"})
        self._logged: dict[str, int] = {}
        if record is not None and self._resume(record["id"]):
            self._id = record["id"]
        else:
            self._id = self._create()
            folder.write_json(RECORD, {"id": self._id})
        self._log([(row["step"], curves(row)) for row in self._tracked.rows])

    def add(self, row: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._log([(row["step"], curves(row))])

    def add_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """See ``Tracker``; steps from before this start are there already."""
        for name, png in images.items():
            # A name says its step, so an image that is made again replaces the first.
            picture = PIL.Image.open(io.BytesIO(png))
            self._client.log_image(self._id, picture, f"images/{name}-{step:09d}.png")

    def add_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """MLflow has no histograms."""

    def add_result(self, result: dict[str, Any]) -> None:
        """Adds result.json as a file, and its numbers as metrics ``result/...``."""
        self._client.log_dict(self._id, result, "result.json")
        numbers = {
            f"result/{name}": value
            for name, value in result.items()
            if isinstance(value, (int, float))
        }
        self._log([(result["step"], numbers)])

    def finish(self, ending: Ending) -> None:
        """See ``Service``."""
        self._client.set_terminated(self._id, _STATUS[ending])

    def _resume(self, run_id: str) -> bool:
        """Notes each metric's last step in a run; False if the store lacks the run."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        for name in run.data.metrics:
            history = self._client.get_metric_history(run_id, name)
            self._logged[name] = max(metric.step for metric in history)
        self._client.update_run(run_id, status="RUNNING")
        return True

    def _create(self) -> str:
        """A new run with the config as its parameters."""
        name = self._tracked.config.tracking.project
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another run creates it now
                self._client.create_experiment(name)
            experiment = self._client.get_experiment_by_name(name)
        run = self._client.create_run(
            experiment.experiment_id, run_name=self._tracked.name
        )
        params = [
            Param(name, str(value)[:_MOST_CHARACTERS])
            for name, value in flatten(self._tracked.config).items()
        ]
        for start in range(0, len(params), _MOST_PARAMS):
            some = params[start : start + _MOST_PARAMS]
            self._client.log_batch(run.info.run_id, params=some)
        return run.info.run_id

    def _log(self, steps: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Logs the values that the store lacks."""
        now = int(1000 * time.time())
        metrics = []
        for step, values in steps:
            for name, value in values.items():
                if step > self._logged.get(name, -1):
                    self._logged[name] = step
                    metrics.append(Metric(name, float(value), now, step))
        for start in range(0, len(metrics), _MOST_METRICS):
            some = metrics[start : start + _MOST_METRICS]
            self._client.log_batch(self._id, metrics=some)
