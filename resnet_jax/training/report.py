"""report.html: one page that says what a run did, with its pictures inside."""

import os
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import Curves, error_curves, training_curves
from resnet_jax.config import fields, flatten
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import describe_error
from resnet_jax.training.progress import describe_seconds, say
from resnet_jax.workdir import Workdir


def report(
    workdir: str | os.PathLike[str],
    *,
    figure: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Writes the report of a finished run again, and its curves as a picture.

    Args:
      workdir: of ``train``.
      figure: a .png, .svg or .pdf file for the training curves.
      console: where to print; standard output by default.

    Raises:
      UserError: there is no finished run, or the picture cannot be written.
    """
    console = console or rich.console.Console()
    folder = Workdir(workdir)
    result = folder.read_result()
    if result is None:
        raise UserError(
            f"workdir {folder.path} holds no finished run (no result.json); train one "
            "with resnet-jax train"
        )
    if "runs" in result:
        if figure is not None:
            raise UserError(
                f"workdir {folder.path} holds runs of several seeds; for a figure give "
                f"that of one: {folder.path / next(iter(result['runs']))}"
            )
        write_seeds_report(folder, result)
        say(console, f"report: {folder.report}")
        return
    rows = folder.read_rows()
    write_report(folder, result, rows)
    say(console, f"report: {folder.report}")
    if figure is not None:
        try:
            training_curves(rows, _title(result)).savefig(figure, dpi=100)
        except (OSError, ValueError) as error:
            raise UserError(f"figure {figure} cannot be written: {error}") from error
        say(console, f"figure: {figure}")


def write_report(
    folder: Workdir, result: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes report.html: self-contained, its curves drawn as SVG.

    Args:
      folder: the workdir, for its config.
      result: the content of result.json.
      rows: of metrics.jsonl.
    """
    title = _title(result)
    config = folder.read_config()
    values = flatten(config) if config else {}
    defaults = {name: field.default for name, field in fields().items()}
    page = pages.page(
        title,
        pages.paragraph(
            describe_error("test", result["test_errors"], result["test_count"]), "error"
        ),
        pages.paragraph(
            f"The last checkpoint (step {result['step']:,}) on every test example, one "
            f"run of seed {result['seed']}. The test set chose no checkpoint."
        ),
        pages.svg(training_curves(rows, title)),
        pages.heading("The run"),
        pages.facts(_facts(result)),
        pages.heading("Config"),
        pages.paragraph("Bold: set otherwise than the default."),
        pages.facts(values, bold={n for n in values if values[n] != defaults[n]}),
        pages.heading("Where it ran"),
        pages.facts(result["environment"]),
    )
    folder.write(folder.report, page)


def write_seeds_report(folder: Workdir, result: dict[str, Any]) -> None:
    """Writes report.html of several seeds.

    Args:
      folder: their workdir.
      result: the content of its result.json; see ``seeds.train``.
    """
    runs = result["runs"]

    def rows_of(name: str) -> list[dict[str, Any]]:
        return Workdir(folder.path / name).read_rows()

    table = [
        [
            name,
            f"{100 * run['train_error']:.2f}",
            f"{100 * run['test_error']:.2f}",
            f"{run['test_errors']} of {run['test_count']}",
            describe_seconds(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    page = pages.page(
        _title(result),
        pages.paragraph(f"test error {result['summary']}", "error"),
        pages.paragraph(
            "Mean and standard deviation (n - 1) over seeds, each at its last "
            f"checkpoint (step {result['step']:,}), on every test example. The test "
            "set chose no checkpoint."
        ),
        *(
            pages.paragraph(f"{name} diverged: {failure}")
            for name, failure in result["failures"].items()
        ),
        pages.svg(
            error_curves(
                {"": [Curves(result["model"], [rows_of(name) for name in runs])]},
                _title(result),
            )
        ),
        pages.grid(
            ["run", "training error (%)", "test error (%)", "wrong", "time"], table
        ),
        pages.heading("Where it ran"),
        pages.facts({"command": result["command"], **result["environment"]}),
    )
    folder.write(folder.report, page)


def _title(result: dict[str, Any]) -> str:
    return f"{result['model']} on {result['data']}"


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "length": f"{result['step']:,} steps of {result['global_batch_size']}, "
        f"{result['epoch']:.4g} epochs",
        "parameters": f"{result['parameters']:,}",
        "multiply-adds an image": f"{result['multiply_adds']:,}",
        "training examples": f"{result['training_examples']:,}",
        "training error": f"{100 * result['train_error']:.2f} %",
        "time": describe_seconds(result["seconds"]),
        "finished": result["finished"],
        "command": result["command"],
    }
    if "holdout_error" in result:
        facts["held-out error"] = describe_error(
            "held-out", result["holdout_errors"], result["holdout_count"]
        )
    if result.get("train_skipped"):
        facts["skipped"] = f"{result['train_skipped']:,} broken images replaced"
    if "test_top5_error" in result:
        facts["test top-5 error"] = f"{100 * result['test_top5_error']:.2f} %"
    if result["images_per_second"] is not None:
        facts["speed"] = f"{result['images_per_second']:,.0f} images/s (median)"
    return facts
