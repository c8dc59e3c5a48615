"""The result of a finished run."""

import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.evaluation.evaluator import describe_error
from resnet_jax.training.environment import command_line, environment
from resnet_jax.training.progress import describe_seconds, say
from resnet_jax.training.setup import Setup


def make_result(setup: Setup, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of result.json, from the last row."""
    config, last = setup.config, rows[-1]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    evaluated = {
        name: value
        for name, value in last.items()
        if name.startswith(("test_", "holdout_"))
    }
    skipped = [row["train_skipped"] for row in rows if "train_skipped" in row]
    return {
        **evaluated,
        **({"train_skipped": sum(skipped)} if skipped else {}),
        "train_error": last["train_error"],
        "checkpoint": "last",
        "step": last["step"],
        "epoch": last["epoch"],
        "seed": config.seed,
        "model": config.model.name,
        "parameters": count_parameters(setup.abstract_state().params),
        "multiply_adds": count_multiply_adds(setup.model, setup.dataset.image_shape),
        "data": config.data.name,
        "training_examples": len(setup.dataset.train),
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
    """Prints the result of a finished run as a table, its error and its report."""
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1))
    table.add_row("model", f"{result['model']}, {result['parameters']:,} parameters")
    table.add_row("data", f"{result['data']}, {result['training_examples']:,} examples")
    table.add_row("length", f"{result['step']:,} steps, {result['epoch']:.4g} epochs")
    table.add_row("training error", f"{100 * result['train_error']:.2f} %")
    if "holdout_error" in result:
        table.add_row("held-out error", f"{100 * result['holdout_error']:.2f} %")
    if "test_top5_error" in result:
        table.add_row("test top-5 error", f"{100 * result['test_top5_error']:.2f} %")
    if result["images_per_second"] is not None:
        table.add_row("speed", f"{result['images_per_second']:,.0f} images/s (median)")
    if result.get("train_skipped"):
        table.add_row("skipped", f"{result['train_skipped']:,} broken images replaced")
    table.add_row("time", describe_seconds(result["seconds"]))
    console.print(table, highlight=False)
    say(console, describe_error("test", result["test_errors"], result["test_count"]))
    say(console, f"report: {report}")
