"""Where a run happened: versions, hardware and the code's commit."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_DISTRIBUTION = "deep-residual-jax"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, for result.json and benchmark results."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_cores": usable_cores(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "commit": commit(),
    }


def checkout() -> Path | None:
    """The folder of a checkout; None if the package is installed elsewhere."""
    folder = Path(__file__).parent.parent
    return folder if (folder / "pyproject.toml").exists() else None


def how_to_install(extra: str) -> str:
    """The command that installs an optional part, such as ``demo``."""
    folder = checkout()
    if folder is not None:
        return f"pip install -e '{folder}[{extra}]'"
    urls = importlib.metadata.metadata(_DISTRIBUTION).get_all("Project-URL") or []
    repository = dict(url.split(", ") for url in urls)["Repository"]
    return f"pip install '{_DISTRIBUTION}[{extra}] @ git+{repository}'"


def commit() -> str | None:
    """The commit of a checkout, with ``+`` if tracked files differ; None elsewhere."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        options: Any = {"text": True, "stderr": subprocess.DEVNULL, "timeout": 10}
        return subprocess.check_output(command, **options).strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        name = "python -m resnet_jax"
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def usable_cores() -> int:
    """Processors that this process may use; in a container, often fewer than exist."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's name if the system gives it, or its architecture."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
