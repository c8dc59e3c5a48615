"""What a finished run leaves: result.json, its printed table, and report.html."""

import os
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.analysis.plots import (
    Curves,
    check_file,
    error_curves,
    save,
    training_curves,
)
from resnet_jax.analysis.run_pictures import run_pictures
from resnet_jax.config import flatten
from resnet_jax.config.schema import changed_fields
from resnet_jax.console import describe_seconds, print_facts, say
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
    evaluated = [name for name in last if name.startswith(("test_", "holdout_"))]
    return {
        **{name: last[name] for name in evaluated},
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
    """Prints the facts of a finished run, its test error and its report."""
    print_facts(console, _facts(result))
    say(console, describe_error("test", result["test_errors"], result["test_count"]))
    say(console, f"report: {report}")


def _facts(result: dict[str, Any]) -> dict[str, str]:
    """A run's facts as text, for the terminal and the report."""
    facts = {
        "model": f"{result['model']}, {result['parameters']:,} parameters",
        "multiply-adds": f"{result['multiply_adds']:,} per image",
        "data": f"{result['data']}, {result['training_examples']:,} training examples",
        "length": f"{result['step']:,} steps of {result['global_batch_size']}, "
        f"{result['epoch']:.4g} epochs",
    }
    errors = {
        "train_error": "training error",
        "holdout_error": "held-out error",
        "test_top5_error": "test top-5 error",
    }
    for name, text in errors.items():
        if name in result:
            facts[text] = f"{100 * result[name]:.2f} %"
    if "holdout_error" in result:
        counts = f" ({result['holdout_errors']} of {result['holdout_count']})"
        facts["held-out error"] += counts
    if result.get("images_per_second") is not None:
        facts["speed"] = f"{result['images_per_second']:,.0f} images/s (median)"
    if result.get("train_skipped"):
        facts["skipped"] = f"{result['train_skipped']:,} broken images replaced"
    return facts | {"time": describe_seconds(result["seconds"])}


def report(
    workdir: str | os.PathLike[str],
    *,
    figure: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Writes the report of a finished run again, and its curves as a picture.

    The report shows a batch of the data and the mistakes on the test set, if data and
    checkpoint are still there; see ``analysis.run_pictures``.

    Args:
      workdir: of ``train``.
      figure: a .png, .svg or .pdf file for the training curves.
      console: where to print; standard output by default.

    Raises:
      UserError: there is no finished run, or the picture cannot be written.
    """
    console = console or rich.console.Console()
    if figure is not None:
        check_file(figure)
    folder = Workdir(workdir)
    result = folder.read_result()
    if result is None:
        raise UserError(
            f"workdir {folder.path} holds no finished run (no result.json); train one "
            "with resnet-jax train"
        )
    if "runs" not in result:
        rows = folder.read_rows()
        if not folder.report.exists():  # else it may have pictures, and keeps them
            write_report(folder, result, rows)
        add_pictures(folder, result, rows, console)
    elif figure is None:
        write_seeds_report(folder, result)
    else:
        raise UserError(
            f"workdir {folder.path} holds runs of several seeds; for a figure, give "
            f"the workdir of one: {folder.path / next(iter(result['runs']))}"
        )
    say(console, f"report: {folder.report}")
    if figure is not None:
        say(console, f"figure: {save(training_curves(rows, _title(result)), figure)}")


def write_report(
    folder: Workdir,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    pictures: Sequence[str] = (),
) -> None:
    """Writes report.html from result.json and the rows of metrics.jsonl.

    The page is self-contained, its curves drawn as SVG.

    Args:
      folder: of the run.
      result: the content of result.json.
      rows: of metrics.jsonl.
      pictures: parts of the page, from ``run_pictures``.
    """
    if not pictures:
        command = f"resnet-jax report --workdir {folder.path}"
        text = f"To add pictures of the data and of mistakes: {command}"
        pictures = [pages.paragraph(text, "note")]
    page = pages.page(
        _title(result),
        pages.paragraph(
            describe_error("test", result["test_errors"], result["test_count"]), "error"
        ),
        pages.paragraph(
            f"The last checkpoint (step {result['step']:,}) on every test example, one "
            f"run with seed {result['seed']}. The test set chose no checkpoint."
        ),
        pages.svg(training_curves(rows, _title(result))),
        *pictures,
        pages.heading("The run"),
        pages.facts(
            _facts(result) | {name: result[name] for name in ("finished", "command")}
        ),
        *config_parts(folder),
        pages.heading("Where it ran"),
        pages.facts(result["environment"]),
    )
    folder.write(folder.report, page)


def config_parts(folder: Workdir) -> list[str]:
    """Parts of a page: the fields that differ from the default, the others folded."""
    config = folder.read_config()
    if config is None:
        return []
    changed = changed_fields(config)
    others = {n: value for n, value in flatten(config).items() if n not in changed}
    return [
        pages.heading("Config"),
        pages.facts(changed),
        pages.folded(f"{len(others)} fields at their defaults", pages.facts(others)),
    ]


def add_pictures(
    folder: Workdir,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    console: rich.console.Console,
) -> None:
    """Writes report.html again, with pictures of the data and of mistakes.

    The run is finished and its report written. So a fault, or Ctrl-C, leaves them as
    they are and prints one sentence.
    """
    try:
        write_report(folder, result, rows, run_pictures(folder.path, result))
    except KeyboardInterrupt:
        say(console, "warning: no new pictures for the report: interrupted")
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        say(console, f"warning: no new pictures for the report: {reason}")


def write_seeds_report(folder: Workdir, result: dict[str, Any]) -> None:
    """Writes report.html of several seeds from their result.json."""
    runs = result["runs"]
    rows = [Workdir(folder.path / name).read_rows() for name in runs]
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
        pages.svg(error_curves({"": [Curves(result["model"], rows)]}, _title(result))),
        pages.grid(
            ["run", "training error (%)", "test error (%)", "wrong", "time"], table
        ),
        pages.heading("Where it ran"),
        pages.facts({"command": result["command"], **result["environment"]}),
    )
    folder.write(folder.report, page)


def _title(result: dict[str, Any]) -> str:
    return f"{result['model']} on {result['data']}"
