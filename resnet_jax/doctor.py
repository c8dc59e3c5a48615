"""What a machine offers to resnet_jax, and what is wrong with it.

Imports no jax: a broken installation is what this is for. Devices are tried in another
process, which is stopped if it hangs.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.console

import resnet_jax
from resnet_jax import device_check
from resnet_jax.console import print_facts, say
from resnet_jax.environment import commit, how_to_install, usable_cores
from resnet_jax.errors import UserError

TIMEOUT_SECONDS = 120.0
"""The first use of a GPU or TPU takes up to a minute."""
EXTRAS = {
    "cuda12": "jax-cuda12-plugin",
    "cuda13": "jax-cuda13-plugin",
    "tpu": "libtpu",
    "gcs": "gcsfs",
    "demo": "scikit-learn",
    "tensorflow": "tensorflow",
    "torch": "torch",
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "detection": "faster-coco-eval",
}
"""The extras, and the package that shows that one is installed."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_CUDA13_DRIVER = 580
"""The first driver that runs CUDA 13, by NVIDIA's release notes."""
_SETTINGS = re.compile(r"(JAX|XLA|TF_GPU|NCCL)_\w+|CUDA_VISIBLE_DEVICES|LIBTPU_\w+")
_GIB = 2**30
_FEW_GIB = 5
_MOST_FILES = 100_000
"""Of a cache, that are looked at for its size."""

Facts = dict[str, Any]


def doctor(
    *,
    json_path: str | os.PathLike[str] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    console: rich.console.Console | None = None,
) -> Facts:
    """Prints versions, devices, caches and resources, and what to do about faults.

    Each device compiles and runs a small convolution, in a process of its own.

    Args:
      json_path: also write the facts here.
      timeout_seconds: for all devices together.
      console: None means standard output.

    Returns:
      The facts, with the sentences printed last as ``hints``.

    Raises:
      UserError: jax runs on no device. The facts are printed and written before.
    """
    console = console or rich.console.Console()
    facts = gather_facts(timeout_seconds)
    facts["hints"] = find_hints(facts)
    print_facts(console, describe_facts(facts))
    say(console, "")
    for hint in facts["hints"]:
        say(console, f"- {hint}")
    if not facts["hints"]:
        say(console, "Nothing to improve.")
    if json_path is not None:
        Path(json_path).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    if not _running(facts):
        raise UserError("jax runs on no device here; see the hints above")
    return facts


def gather_facts(timeout_seconds: float = TIMEOUT_SECONDS) -> Facts:
    """The facts of this machine; takes at most about ``timeout_seconds``."""
    return {
        "resnet_jax": resnet_jax.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {name: _version(name) for name in _PACKAGES},
        "extras": {extra: _version(name) for extra, name in EXTRAS.items()},
        "nvidia": _nvidia(),
        "tpu": _has_tpu(),
        "settings": _settings(),
        "devices": try_devices(timeout_seconds),
        "caches": _caches(),
        "machine": _machine(),
        "jpeg": _jpeg(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia() -> Facts:
    """NVIDIA's GPUs and driver, whether or not jax sees them."""
    query = "--query-gpu=name,driver_version,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    lines = _output(command, 15).splitlines()
    fields = [[part.strip() for part in line.split(",")] for line in lines]
    gpus = [field for field in fields if len(field) == 3]
    driver = gpus[0][1] if gpus else None
    file = Path("/proc/driver/nvidia/version")
    with contextlib.suppress(OSError):
        if driver is None and (found := re.search(r"\s(\d+\.\d+)", file.read_text())):
            driver = found[1]
    names = [
        f"{name}, {int(mib) // 1024} GiB" for name, _, mib in gpus if mib.isdigit()
    ]
    return {"gpus": names, "driver": driver}


def _has_tpu() -> bool:
    """Whether this is a TPU host: Google's PCI devices, or their device files."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            kind = (vendor.parent / "class").read_text().strip()
            # Classes 1 and 2: Google's virtual disks and network cards.
            google = vendor.read_text().strip() == "0x1ae0"
            if google and not kind.startswith(("0x01", "0x02")):
                return True
    return False


def _settings() -> dict[str, str]:
    """Environment variables that change what jax does."""
    names = [name for name in os.environ if _SETTINGS.fullmatch(name)]
    if "cuda" in os.environ.get("LD_LIBRARY_PATH", "").lower():
        names.append("LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in sorted(names)}


def try_devices(timeout_seconds: float) -> Facts:
    """Runs ``device_check`` in another process; never waits longer than that.

    Returns:
      ``backend``, the ``devices`` with ``seconds`` or a ``fault``, and the ``fault`` of
      the process, if it hung or ended early.
    """
    command = [sys.executable, device_check.__file__]
    # Another program may use the GPU now, and jax would take three quarters of it.
    variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=variables, start_new_session=True
        )
        fault = None
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            fault = f"no answer within {timeout_seconds:g} s"
            _kill(process)
        else:
            if status:
                err.seek(0)
                fault = _last_line(err.read()) or f"exit status {status}"
        out.seek(0)
        return _read_devices(out.read().decode(errors="replace")) | {"fault": fault}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children. One that a driver holds is left behind."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _read_devices(output: str) -> Facts:
    """The facts in the lines of ``device_check``; the last one may be cut short."""
    facts: Facts = {"backend": None, "devices": []}
    for text in output.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        number = line.pop("device", None)
        if number is None:
            facts |= line
        else:
            facts["devices"][number] |= line
    return facts


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _output(command: list[str], timeout_seconds: float) -> str:
    """What a program prints; nothing if it is missing, fails or hangs."""
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            return ""
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return ""
        out.seek(0)
        return "" if status else out.read().decode(errors="replace")


def _caches() -> dict[str, Facts]:
    """Folders that hold programs, weights and data sets."""
    home = Path.home() / ".cache"
    hub = os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME") or home / "huggingface", "hub"
    )
    tfds = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    infos = [*tfds.glob("*/*/dataset_info.json"), *tfds.glob("*/*/*/dataset_info.json")]
    prepared = {file.relative_to(tfds).parts[0] for file in infos}
    caches = {"huggingface": _folder(hub), "tfds": _folder(tfds)}
    caches["tfds"]["data_sets"] = sorted(prepared)
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches["compiled"] = _folder(compiled)
    return caches


def _folder(path: str | os.PathLike[str]) -> Facts:
    """A folder and its size in bytes; None if it is missing, remote or very large."""
    size, count = 0, 0
    began = time.monotonic()
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
            count += 1
        if count > _MOST_FILES or time.monotonic() - began > 5:
            return {"path": str(path), "bytes": None}
    exists = os.path.isdir(path)
    return {"path": str(path), "bytes": size if exists else None}


def _machine() -> Facts:
    """Cores, memory and disk; a container's limit if that is smaller."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path("/sys/fs/cgroup", file).read_text())
            memory = min(limit, memory or limit)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "memory_bytes": memory,
        "folder": os.getcwd(),
        "disk_free_bytes": shutil.disk_usage(".").free,
    }


def _jpeg() -> str:
    """Which decoder reads JPEG files: ``windows`` or ``whole images``."""
    from resnet_jax.data.partial_jpeg import decoder

    return "whole images" if decoder() is None else "windows"


def _running(facts: Facts) -> list[Facts]:
    """The devices whose convolution was right."""
    devices = facts["devices"]["devices"]
    return [d for d in devices if "seconds" in d and d["fault"] is None]


def find_hints(facts: Facts) -> list[str]:
    """What to do, a sentence each, from facts alone."""
    checks = (_broken_devices, _hidden_gpu, _plugins, _tpu, _environment, _resources)
    return [sentence for check in checks for sentence in check(facts)]


def _broken_devices(facts: Facts) -> Iterator[str]:
    found = facts["devices"]
    fault, devices = found["fault"], found["devices"]
    platforms = facts["settings"].get("JAX_PLATFORMS", "cpu")
    blamed = [n for n in facts["settings"] if n.lower() in (fault or "").lower()]
    if fault and not devices and blamed and blamed != ["JAX_PLATFORMS"]:
        yield f"jax does not start ({fault}): unset {blamed[0]}, or correct it"
    elif fault and not devices and platforms != "cpu":
        yield (
            f"jax finds no devices ({fault}), and JAX_PLATFORMS={platforms} chooses "
            "them: unset it, or install what it needs (see the extras above)"
        )
    elif fault and not devices:
        yield (
            f"jax finds no devices ({fault}): another program may hold them, and a "
            "slice of TPU hosts needs the same command on all hosts; "
            "JAX_PLATFORMS=cpu works without them"
        )
    for number, device in enumerate(devices):
        name = f"device {number} ({device['kind']})"
        reason = device.get("fault") or ("seconds" not in device and fault)
        if reason:
            yield (
                f"{name} does not run a convolution ({_short(reason)}): end other "
                "programs on it, restart the machine, or leave it out with "
                "CUDA_VISIBLE_DEVICES or JAX_PLATFORMS=cpu"
            )
            return  # the others were not tried, or have the same fault


def _hidden_gpu(facts: Facts) -> Iterator[str]:
    """An NVIDIA GPU that jax does not use."""
    nvidia, backend = facts["nvidia"], facts["devices"]["backend"]
    if nvidia["driver"] is None or backend not in ("cpu", None):
        return
    platforms = facts["settings"].get("JAX_PLATFORMS", "")
    name = nvidia["gpus"][0] if nvidia["gpus"] else f"driver {nvidia['driver']}"
    here = f"this machine has an NVIDIA GPU ({name}), but jax does not use it"
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        yield f"{here}, because JAX_PLATFORMS={platforms}: unset it"
    elif not _installed_plugins(facts):
        yield f"{here}: install its plugin with {how_to_install(_cuda(facts))}"
    elif facts["settings"].get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield f"{here}, because CUDA_VISIBLE_DEVICES hides all: unset it"
    elif backend == "cpu":
        yield (
            f"{here}, although a plugin is installed: look at what "
            "`python -c 'import jax; jax.devices()'` prints, and at nvidia-smi"
        )


def _installed_plugins(facts: Facts) -> dict[str, str]:
    extras = facts["extras"]
    return {extra: extras[extra] for extra in ("cuda12", "cuda13") if extras[extra]}


def _cuda(facts: Facts) -> str:
    """The extra that fits the driver."""
    driver = int(facts["nvidia"]["driver"].split(".")[0])
    return "cuda13" if driver >= _CUDA13_DRIVER else "cuda12"


def _plugins(facts: Facts) -> Iterator[str]:
    """Parts of jax that do not fit together."""
    jax, jaxlib = (facts["versions"][name] for name in ("jax", "jaxlib"))
    plugins = _installed_plugins(facts)
    for extra, version in plugins.items():
        if jaxlib is not None and version != jaxlib:
            yield (
                f"{EXTRAS[extra]} {version} belongs to another version of jax than "
                f"jaxlib {jaxlib}: repair it with {how_to_install(extra)} --upgrade"
            )
    if len(plugins) > 1:
        yield (
            "the plugins of CUDA 12 and of CUDA 13 are both installed: keep one, with "
            "`pip uninstall jax-cuda12-plugin jax-cuda12-pjrt`"
        )
    if None in (jax, jaxlib):
        missing = "jax" if jax is None else "jaxlib"
        yield f"{missing} is not installed: install it with {how_to_install('demo')}"


def _tpu(facts: Facts) -> Iterator[str]:
    libtpu, backend = facts["extras"]["tpu"], facts["devices"]["backend"]
    platforms = facts["settings"].get("JAX_PLATFORMS")
    if facts["tpu"] and backend == "cpu" and not platforms:
        if libtpu is None:
            yield (
                "this machine has TPUs, but jax uses the CPU: install libtpu with "
                f"{how_to_install('tpu')}"
            )
        else:
            yield (
                "this machine has TPUs, but jax uses the CPU: another program may hold "
                "them; end it, or remove /tmp/libtpu_lockfile if none is running"
            )
    elif facts["tpu"] and backend == "cpu" and "tpu" not in str(platforms):
        yield (
            "this machine has TPUs, but jax uses the CPU, because "
            f"JAX_PLATFORMS={platforms}: unset it"
        )
    elif libtpu is not None and not facts["tpu"] and backend != "tpu" and not platforms:
        yield (
            "libtpu is installed and there is no TPU: it only compiles programs for "
            "TPUs here; if jax starts slowly or warns, set JAX_PLATFORMS=cpu or cuda"
        )


def _environment(facts: Facts) -> Iterator[str]:
    settings, backend = facts["settings"], facts["devices"]["backend"]
    if "LD_LIBRARY_PATH" in settings and _installed_plugins(facts):
        yield (
            "LD_LIBRARY_PATH names a CUDA, which hides the libraries that jax's plugin "
            "brings along: unset it if jax fails on the GPU"
        )
    for name in ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS"):
        if settings.get(name, "0").lower() not in ("0", "false", ""):
            yield f"{name}={settings[name]} makes training much slower: unset it"
    devices = facts["devices"]["devices"]
    if backend == "cpu" and len(devices) > 1:
        yield (
            f"{len(devices)} devices are simulated on this CPU, which suits tests and "
            "slows training: unset XLA_FLAGS and JAX_NUM_CPU_DEVICES"
        )


def _resources(facts: Facts) -> Iterator[str]:
    machine = facts["machine"]
    if machine["disk_free_bytes"] < _FEW_GIB * _GIB:
        yield (
            f"the disk of {machine['folder']} has {_size(machine['disk_free_bytes'])} "
            "left: make room, or give --workdir on another disk"
        )
    memory = machine["memory_bytes"]
    if memory is not None and memory < _FEW_GIB * _GIB:
        yield (
            f"{_size(memory)} of memory are few: lower data.resident_mib and "
            "training.global_batch_size"
        )
    if facts["jpeg"] == "whole images":
        yield (
            "JPEG files are decoded whole, so that crops take 20 to 25 % longer: "
            "install libturbojpeg 3, or `pip install turbojpeg` where it has a wheel"
        )


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= 200 else f"{line[:200]} ..."


def _size(size: float | None) -> str:
    """Bytes in words."""
    if size is None:
        return "unknown size"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def describe_facts(facts: Facts) -> dict[str, str]:
    """The facts as names and texts, for printing."""
    versions = {
        name: version or "missing" for name, version in facts["versions"].items()
    }
    nvidia, machine = facts["nvidia"], facts["machine"]
    described = {
        "resnet_jax": f"{facts['resnet_jax']}, commit {facts['commit'] or 'unknown'}",
        "python": f"{facts['python']}, {facts['executable']}",
        "libraries": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "devices": _describe_devices(facts["devices"]),
    }
    if nvidia["driver"] is not None:
        gpus = "; ".join(_counted(nvidia["gpus"])) or "no GPU"
        described["NVIDIA"] = f"{gpus}, driver {nvidia['driver']}"
    described |= facts["settings"]
    described |= _describe_caches(facts["caches"])
    extras = facts["extras"]
    present = [f"{name} ({version})" for name, version in extras.items() if version]
    absent = [name for name, version in extras.items() if not version]
    return described | {
        "extras": ", ".join(present) or "none",
        "not installed": f"{', '.join(absent)}: {how_to_install('NAME')}",
        "machine": f"{machine['system']}, {machine['cores']} usable cores, "
        f"{_size(machine['memory_bytes'])} of memory",
        "free disk": f"{_size(machine['disk_free_bytes'])} in {machine['folder']}",
        "JPEG decoder": f"libjpeg-turbo, {facts['jpeg']}",
    }


def _describe_devices(found: Facts) -> str:
    """Equal devices in one line: ``8 x NVIDIA H100, 59.6 GiB each, convolution ok``."""
    texts = []
    for device in found["devices"]:
        text = device["kind"]
        if device["memory_bytes"] is not None:
            text += f", {_size(device['memory_bytes'])} for jax"
        works = "seconds" in device and device["fault"] is None
        texts.append(f"{text}, convolution {'runs' if works else 'FAILS'}")
    return "; ".join(_counted(texts)) or "none"


def _counted(texts: list[str]) -> list[str]:
    """Equal texts once, with their number."""
    return [f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts)]


def _describe_caches(caches: Mapping[str, Facts]) -> dict[str, str]:
    def describe(cache: Facts) -> str:
        size = "" if cache["bytes"] is None else f", {_size(cache['bytes'])}"
        return f"{cache['path']}{size}"

    sets = caches["tfds"]["data_sets"]
    shown = ", ".join(sets[:8]) + (f" and {len(sets) - 8} more" if sets[8:] else "")
    compiled = caches.get("compiled")
    return {
        "compiled programs": describe(compiled) if compiled else "in each workdir",
        "Hugging Face": describe(caches["huggingface"]),
        "tfds": f"{describe(caches['tfds'])}; prepared: {shown or 'none'}",
    }
