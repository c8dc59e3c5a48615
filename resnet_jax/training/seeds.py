"""Training: one run of a config, or several that differ in their seed alone."""

import os
from datetime import UTC, datetime
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.config import Config, resolve
from resnet_jax.errors import UserError
from resnet_jax.training.environment import command_line, environment
from resnet_jax.training.loop import train_one
from resnet_jax.training.members import (
    Outcome,
    Spread,
    members_of,
    train_members,
)
from resnet_jax.training.progress import say
from resnet_jax.training.report import write_seeds_report
from resnet_jax.workdir import Workdir


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains a net as a config says; goes on where an earlier call was stopped.

    See ``train_one``. With ``config.seeds`` above 1 it runs once for each seed, in the
    folders ``seed-0``, ``seed-1``, ... of the workdir, each of them a workdir; what
    they have in common lies in the workdir's own result.json and report.html.

    Args:
      config: made by a config file's ``get_config``, or a Config.
      workdir: a folder, made where it is missing, or gs://BUCKET/FOLDER.
      console: where to print; standard output by default.

    Returns:
      The content of result.json. Of one run: ``test_error`` as a share, ``test_errors``
      of ``test_count``, and where it comes from. Of several: ``test_error`` is their
      mean, ``test_error_deviation`` their standard deviation, and ``runs`` has each.

    Raises:
      UserError: a fault in config, data or workdir, or a loss that is not finite.
      Preempted: SIGTERM asked the run to stop, and it has saved.
    """
    config = resolve(config)
    if config.seeds == 1:
        return train_one(config, workdir, console)
    console = console or rich.console.Console(quiet=not distributed.is_primary())
    folder = Workdir(workdir)
    folder.refuse_other_run(config)
    folder.prepare()
    with folder.lock(lambda text: say(console, text)):
        folder.write_config(config, None, command_line())
        outcomes = train_members(members_of(config), folder.path, console)
    result = _combined(config, outcomes)
    folder.write_result(result)
    write_seeds_report(folder, result)
    say(console, "")
    say(console, f"test error {result['summary']}")
    for name, failure in result["failures"].items():
        say(console, f"{name} diverged: {failure}")
    say(console, f"report: {folder.report}")
    return result


def _combined(config: Config, outcomes: list[Outcome]) -> dict[str, Any]:
    """The content of result.json over several seeds."""
    results = {o.workdir.path.name: o.result for o in outcomes if o.result is not None}
    failures = {
        o.workdir.path.name: o.failure for o in outcomes if o.failure is not None
    }
    if not results:
        raise UserError(
            f"all {len(outcomes)} runs have diverged: {outcomes[0].failure}"
        )
    first = next(iter(results.values()))
    spreads = {
        name: Spread.of(result[name] for result in results.values())
        for name in ("test_error", "holdout_error", "train_error")
        if name in first
    }
    metrics: dict[str, Any] = {}
    for name, spread in spreads.items():
        metrics |= {name: spread.mean, f"{name}_deviation": spread.deviation}
    kept = ("step", "epoch", "model", "parameters", "multiply_adds", "data")
    return {
        **metrics,
        "summary": spreads["test_error"].percent(),
        "checkpoint": "last",
        **{name: first[name] for name in kept},
        "test_count": first["test_count"],
        "runs": results,
        "failures": failures,
        "seconds": sum(result["seconds"] for result in results.values()),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
