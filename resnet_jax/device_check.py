"""Runs a convolution on each device of this process, and prints what happened.

A program of its own, started by ``doctor``: a broken accelerator may hang, or end the
process. Each line is a JSON object, printed as soon as it is known.
"""

import json
import sys
import time
from typing import Any


def _report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def check_devices() -> None:
    """Prints the devices first, then one line for each when its convolution is done."""
    import jax

    devices = jax.local_devices()
    _report(
        backend=jax.default_backend(),
        devices=[
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
            }
            for device in devices
        ],
    )
    for number, device in enumerate(devices):
        start = time.perf_counter()
        try:
            fault = _convolve(device)
        except Exception as error:  # whatever the device's runtime raises
            fault = str(error) or type(error).__name__
        _report(device=number, fault=fault, seconds=time.perf_counter() - start)


def _convolve(device: Any) -> str | None:
    """A 3x3 convolution of ones, jitted: it counts the pixels under the kernel.

    Returns:
      How the result is wrong, or None.
    """
    import jax
    import numpy as np

    images = jax.device_put(np.ones((2, 16, 16, 8), np.float32), device)
    kernel = jax.device_put(np.ones((3, 3, 8, 4), np.float32), device)
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=layout
        )
    )
    result = np.asarray(convolve(images, kernel))
    seen = np.full(16, 3)
    seen[[0, -1]] = 2
    expected = np.broadcast_to(
        8.0 * np.outer(seen, seen)[None, ..., None], result.shape
    )
    if not np.array_equal(result, expected):
        worst = np.abs(result - expected).max()
        return f"a convolution is wrong by {worst:g}"
    return None


if __name__ == "__main__":
    # Python puts this file's folder first, where modules are named like others.
    sys.path.pop(0)
    check_devices()
