"""One run: a call trains a config in a workdir, or goes on where it was."""

import os
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.config import Config, resolve
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.feeds import LastDataset
from resnet_jax.errors import Preempted
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.compilation_cache import compiled_programs_in
from resnet_jax.training.environment import command_line
from resnet_jax.training.precise_statistics import check_precise_statistics
from resnet_jax.training.progress import derived_values, print_config, say
from resnet_jax.training.report import write_report
from resnet_jax.training.result import make_result, print_result
from resnet_jax.training.run import Run, Start
from resnet_jax.training.setup import Setup, prepare
from resnet_jax.training.state import TrainState
from resnet_jax.training.stopping import StopSignal
from resnet_jax.workdir import Workdir


def train_one(
    config: Any,
    workdir: str | os.PathLike[str],
    console: rich.console.Console | None = None,
    datasets: LastDataset | None = None,
) -> dict[str, Any]:
    """Trains a net as a config says; goes on where an earlier call was stopped.

    The workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
    result.json and report.html. A run killed at any moment and started again ends bit
    for bit where an undisturbed one ends, on the same number and kind of devices.
    With several processes, all of them call it, in ``distributed.started``.

    Args:
      config: made by a config file's ``get_config``, or a Config.
      workdir: a folder, made where it is missing, or gs://BUCKET/FOLDER.
      console: where to print; standard output by default.
      datasets: opens the data, for several runs in a row.

    Returns:
      The content of result.json: ``test_error`` as a share, ``test_errors`` of
      ``test_count``, and where it comes from.

    Raises:
      UserError: a fault in config, data or workdir, or a loss that is not finite.
      Preempted: SIGTERM asked the run to stop, and it has saved.
    """
    # The order of a start, which a restart shares:
    # 1. Refuse what is wrong with the config and workdir, before any device is used.
    config = resolve(config)
    console = console or rich.console.Console(quiet=not distributed.is_primary())
    folder = Workdir(workdir)
    folder.refuse_other_run(config)
    result = folder.read_result() if distributed.is_primary() else None
    if distributed.broadcast(result is not None):
        result = result or folder.read_result() or {}
        say(console, f"{folder.path} holds a finished run; nothing to do")
        print_result(console, result, folder.report)
        return result
    folder.prepare()
    cache = config.compilation_cache
    with (
        folder.lock(lambda text: say(console, text)),
        StopSignal(lambda text: say(console, text)) as stop,
        compiled_programs_in(
            None if cache is None else folder.compiled_programs(cache)
        ),
    ):
        try:
            dataset = None if datasets is None else datasets.open(config)
            return _train(config, folder, console, stop, dataset)
        except Preempted as stopped:
            say(console, str(stopped))
            raise


def _train(
    config: Config,
    folder: Workdir,
    console: rich.console.Console,
    stop: StopSignal,
    dataset: Dataset | None,
) -> dict[str, Any]:
    # 2. Open the data and build the parts; write down what is going to run.
    setup = prepare(config, dataset=dataset)
    check_precise_statistics(setup)
    folder.check_shared()
    folder.write_config(config, setup.derived, command_line())
    _print_start(console, setup)
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        # 3. Restore the newest checkpoint that is whole, or make the first state.
        state, start = _start(setup, checkpoints, folder, console)
        rows = start.rows
        # 4. Run the steps that are left.
        if int(state.step) < setup.derived.steps or start.row_is_due:
            rows = Run(setup, checkpoints, folder, console, stop, start).run(state)
        # 5. All that is reported follows from the last checkpoint's rows.
        checkpoints.wait()
    result = make_result(setup, rows)
    write_report(folder, result, rows)
    folder.write_result(result)
    print_result(console, result, folder.report)
    return result


def _start(
    setup: Setup,
    checkpoints: Checkpoints,
    folder: Workdir,
    console: rich.console.Console,
) -> tuple[TrainState, Start]:
    """The state to go on from, and all else that its checkpoint says.

    metrics.jsonl then holds just its rows: those written after the checkpoint belong
    to steps that will be run again.
    """
    restored = checkpoints.restore_newest(
        setup.abstract_state(), warn=lambda text: say(console, f"warning: {text}")
    )
    if restored is None:
        folder.write_rows([])
        return setup.fresh_state(), Start()
    state, start = restored[0], Start.of(restored[1])
    folder.write_rows(start.rows)
    say(console, f"going on from the checkpoint at step {int(state.step)}")
    return state, start


def _print_start(console: rich.console.Console, setup: Setup) -> None:
    dataset, config = setup.dataset, setup.config
    abstract = setup.abstract_state()
    values = derived_values(setup.derived) | {
        "parameters": f"{count_parameters(abstract.params):,}",
        "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
    }
    print_config(console, config, values)
    for note in setup.derived.notes():
        say(console, note)
    parts = [
        dataset.train,
        *([dataset.holdout] if dataset.holdout else []),
        dataset.test,
    ]
    counts = ", ".join(f"{len(part):,} {part.name}" for part in parts)
    height, width, channels = dataset.image_shape
    say(
        console,
        f"{config.data.name}: {counts}; {height}x{width}x{channels}, "
        f"{dataset.num_classes} classes",
    )
