"""Types of command-line options: numbers with limits, and files to write."""

import argparse
import math
from collections.abc import Callable

from resnet_jax.errors import UserError
from resnet_jax.storage import expand

MOST_COUNT = 10**6
"""Most devices, hosts, shards, timed steps and the like."""
MOST_THREADS = 1024
MOST_CLASSES = 10**7


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type for argparse: an integer between two limits, which it may equal."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"must be an integer from {least:,} to {most:,}, not {_shown(text)}"
            )
        return number

    return parse


def positive(most: float) -> Callable[[str], float]:
    """A type for argparse: a number above 0, and up to ``most``."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(
                f"must be a number above 0 and up to {most:,g}, not {_shown(text)}"
            )
        return number

    return parse


def output_file(text: str) -> str:
    """A type for argparse: a file that can be written, so that no work is lost."""
    try:
        path = expand(text)
        is_folder, folder = path.is_dir(), path.parent.is_dir()
    except (UserError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if is_folder:
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file in it")
    if not folder:
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return str(path)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
