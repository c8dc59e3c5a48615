"""A plan for a person."""

import rich.console
import rich.table

from resnet_jax.console import describe_seconds, say
from resnet_jax.planning.plan import ChipPlan, Plan

_MEMORY = {
    "parameters": "parameters",
    "batch_statistics": "batch statistics",
    "optimizer": "optimizer state",
    "ema": "moving averages",
    "other_state": "rest of the state",
    "gradients": "gradients at the peak",
    "activations": "activations at the peak",
    "resident_data": "resident data set",
    "input_batches": "input batches",
}


def print_plan(console: rich.console.Console, plan: Plan) -> None:
    """Prints a plan, within 80 columns."""
    say(
        console,
        f"{plan.model}, {plan.dtype}, {plan.dataset}; "
        f"{_count(plan.devices, 'device')} on {_count(plan.hosts, 'host')}",
    )
    _print_pairs(console, "run", _run(plan))
    _print_pairs(console, "learning rate", _rates(plan))
    _print_pairs(console, "memory of a device", _memory(plan))
    _print_pairs(console, "work", _work(plan))
    _print_chips(console, plan)
    _print_input(console, plan)
    for note in plan.notes:
        say(console, note)


def _run(plan: Plan) -> dict[str, str]:
    return {
        "steps": f"{plan.steps:,} of {plan.global_batch_size:,} images",
        "epochs": f"{plan.epochs:.4g} of {plan.training_examples:,} examples",
        "a device": f"{plan.images_per_device:,} images a step",
        "a host": f"{plan.images_per_host:,} images a step",
    }


def _rates(plan: Plan) -> dict[str, str]:
    return {
        f"step {rate.step:,}": f"{rate.rate:<10.4g} {rate.when}"
        for rate in plan.learning_rates
    }


def _memory(plan: Plan) -> dict[str, str]:
    rows = {
        title: _bytes(getattr(plan.memory, name))
        for name, title in _MEMORY.items()
        if getattr(plan.memory, name)
    }
    return {**rows, "total": _bytes(plan.memory.total)}


def _work(plan: Plan) -> dict[str, str]:
    ratio = plan.step_multiply_adds / plan.forward_multiply_adds
    return {
        "forward pass": f"{plan.forward_multiply_adds / 1e9:.4g} G multiply-adds an "
        "image",
        "training step": f"{plan.step_multiply_adds / 1e9:.4g} G, {ratio:.2f} times "
        "the forward pass",
        "memory traffic": f"{_bytes(plan.step_bytes)} a step and device",
        "gradients": f"{_bytes(plan.gradient_bytes)}; a device sends "
        f"{_bytes(int(plan.ring_bytes))} a step",
    }


def _print_chips(console: rich.console.Console, plan: Plan) -> None:
    say(console, "")
    say(console, f"time: roofline, not measured; at {plan.efficiency:.0%} of the peaks")
    say(console, "milliseconds a step; all work overlaps at best")
    columns = ("memory", "compute", "traffic", "reduce", "step", "images/s", "run")
    table = _table("chip", *columns)
    for chip in plan.chips:
        table.add_row(
            chip.name,
            f"{chip.memory_share:.0%}" + ("" if chip.fits else " no"),
            *(_milliseconds(seconds) for seconds in _seconds(chip)),
            _short(chip.images_per_second),
            describe_seconds(chip.run_seconds) if chip.fits else "-",
        )
    console.print(table, highlight=False)
    if not all(chip.fits for chip in plan.chips):
        say(console, "no: the run does not fit into the chip's memory")


def _seconds(chip: ChipPlan) -> tuple[float, ...]:
    return (
        chip.compute_seconds,
        chip.traffic_seconds,
        chip.all_reduce_seconds,
        chip.step_seconds,
    )


def _print_input(console: rich.console.Console, plan: Plan) -> None:
    if not plan.streamed:
        return
    say(console, "")
    say(
        console,
        f"input of a host to keep that pace, at {plan.images_per_core:,.0f} images a "
        "second a core",
    )
    table = _table("chip", "images/s", "cores", "bytes/s")
    for chip in plan.chips:
        stored = chip.host_bytes_per_second
        table.add_row(
            chip.name,
            _short(chip.host_images_per_second),
            f"{chip.host_cores:,.1f}",
            "-" if stored is None else f"{_bytes(int(stored))}/s",
        )
    console.print(table, highlight=False)


def _print_pairs(
    console: rich.console.Console, title: str, pairs: dict[str, str]
) -> None:
    say(console, "")
    say(console, title)
    for name, value in pairs.items():
        say(console, f"  {name:<24}{value}")


def _table(first: str, *others: str) -> rich.table.Table:
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bytes(nbytes: int) -> str:
    """10^9 bytes are a GB, as in the chips' descriptions."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes} bytes"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"


def _short(count: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if count >= size:
            return f"{count / (1e6 if unit == 'M' else 1e3):,.3g}{unit}"
    return f"{count:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
