"""What a finished run leaves: result.json, its printed table, and report.html."""

import os
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from resnet_jax.analysis import pages
from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.analysis.plots import Curves, error_curves, training_curves
from resnet_jax.config import fields, flatten
from resnet_jax.console import describe_seconds, say
from resnet_jax.data.dataset import Dataset
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import describe_error
from resnet_jax.training.state import Learner
from resnet_jax.workdir import Workdir


def make_result(
    learner: Learner, dataset: Dataset, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of result.json, from the rows of metrics.jsonl."""
    config, last = learner.config, rows[-1]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    skipped = [row["train_skipped"] for row in rows if "train_skipped" in row]
    evaluated = {
        name: value
        for name, value in last.items()
        if name.startswith(("test_", "holdout_"))
    }
    return {
        **evaluated,
        **({"train_skipped": sum(skipped)} if skipped else {}),
        "train_error": last["train_error"],
        "checkpoint": "last",
        "step": last["step"],
        "epoch": last["epoch"],
        "seed": config.seed,
        "model": config.model.name,
        "parameters": count_parameters(learner.abstract_state().params),
        "multiply_adds": count_multiply_adds(learner.model, learner.image_shape),
        "data": config.data.name,
        "training_examples": len(dataset.train),
        "global_batch_size": config.training.global_batch_size,
        "images_per_second": statistics.median(speeds) if speeds else None,
        "seconds": last["seconds"],
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_result(
    console: rich.console.Console, result: dict[str, Any], report: Path
) -> None:
    """Prints the result of a finished run, its test error and its report."""
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1))
    table.add_row("model", f"{result['model']}, {result['parameters']:,} parameters")
    table.add_row("data", f"{result['data']}, {result['training_examples']:,} examples")
    table.add_row("length", f"{result['step']:,} steps, {result['epoch']:.4g} epochs")
    table.add_row("training error", f"{100 * result['train_error']:.2f} %")
    if "holdout_error" in result:
        table.add_row("held-out error", f"{100 * result['holdout_error']:.2f} %")
    for name, value in _optional_facts(result).items():
        table.add_row(name, value)
    table.add_row("time", describe_seconds(result["seconds"]))
    console.print(table, highlight=False)
    say(console, describe_error("test", result["test_errors"], result["test_count"]))
    say(console, f"report: {report}")


def _optional_facts(result: dict[str, Any]) -> dict[str, str]:
    facts = {}
    if "test_top5_error" in result:
        facts["test top-5 error"] = f"{100 * result['test_top5_error']:.2f} %"
    if result["images_per_second"] is not None:
        facts["speed"] = f"{result['images_per_second']:,.0f} images/s (median)"
    if result.get("train_skipped"):
        facts["skipped"] = f"{result['train_skipped']:,} broken images replaced"
    return facts


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
            f"run with seed {result['seed']}. The test set chose no checkpoint."
        ),
        pages.svg(training_curves(rows, title)),
        pages.heading("The run"),
        pages.facts(_facts(result)),
        pages.heading("Config"),
        pages.paragraph("Bold values differ from the default."),
        pages.facts(values, bold={n for n in values if values[n] != defaults[n]}),
        pages.heading("Where it ran"),
        pages.facts(result["environment"]),
    )
    folder.write(folder.report, page)


def write_seeds_report(folder: Workdir, result: dict[str, Any]) -> None:
    """Writes report.html of several seeds.

    Args:
      folder: their workdir.
      result: the content of its result.json; see ``train.train``.
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
        "multiply-adds per image": f"{result['multiply_adds']:,}",
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
    return facts | _optional_facts(result)
