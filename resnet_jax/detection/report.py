"""The report of a detector's run, as a page."""

from typing import Any

from resnet_jax.workdir import Workdir


def write_detection_report(
    folder: Workdir, result: dict[str, Any], rows: list[dict[str, Any]], data: Any
) -> None:
    """Writes report.html."""
