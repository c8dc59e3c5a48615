"""What this machine offers."""

import os


def usable_cores() -> int:
    """Processors that this process may use; in a container, often fewer than exist."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
