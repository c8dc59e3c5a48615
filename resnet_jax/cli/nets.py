"""Flags that name trained nets; see ``evaluation.nets.load_net``."""

import argparse
from typing import Any

NETS = (
    "a run's workdir, a file of weights, hf-hub:OWNER/NAME or torchvision:MODEL"
    "[.WEIGHTS]"
)


def add_net_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds --weights, --model, --checkpoint, --mean and --std."""
    add = parser.add_argument
    if several:
        add("--weights", "--workdir", nargs="+", metavar="NET", help=NETS)
    else:
        add("--weights", required=True, metavar="NET", help=NETS)
    add(
        "--model",
        metavar="NAME",
        help="the net's name in resnet_jax.list_models(), if its file lacks it",
    )
    add(
        "--checkpoint",
        default="last",
        type=_checkpoint,
        metavar="last|best|STEP",
        help="which checkpoint of a run (default: last)",
    )
    for name in ("mean", "std"):
        add(
            f"--{name}",
            type=_numbers,
            metavar="NUMBERS",
            help=f"{name} of each channel of pixels in [0, 1], such as 0.5,0.5,0.5, if "
            "the net's file lacks it",
        )


def net_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``load_net`` that these flags give."""
    names = ("model", "checkpoint", "mean", "std")
    return {name: getattr(options, name) for name in names}


def _checkpoint(text: str) -> int | str:
    if text in ("last", "best"):
        return text
    if text.isascii() and text.isdecimal() and len(text) < 11:
        return int(text)
    raise argparse.ArgumentTypeError(f"last, best or a step, not {text!r}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"numbers joined by commas, such as 0.485,0.456,0.406, not {text!r}"
        ) from None
