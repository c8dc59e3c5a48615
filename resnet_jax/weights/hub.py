"""Find weights: the path of a file, or a name that is downloaded once.

``hf-hub:OWNER/NAME[@REVISION]`` names a repository of the Hugging Face Hub, and
``torchvision:MODEL[.WEIGHTS]`` one of the files that torchvision publishes.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError, nearest
from resnet_jax.storage import expand, replacing

HUB_PREFIX = "hf-hub:"
TORCHVISION_PREFIX = "torchvision:"

TORCHVISION_ADDRESS = "https://download.pytorch.org/models/"
# The first digits of each file's SHA-256, versions 1 and 2, as in torchvision 0.28.
# VGG-16's IMAGENET1K_FEATURES is left out because it has no classifier.
_CHECKSUMS = {
    "resnet18": ["f37072fd"],
    "resnet34": ["b627a593"],
    "resnet50": ["0676ba61", "11ad3fa6"],
    "resnet101": ["63fe2227", "cd907fc2"],
    "resnet152": ["394f9c45", "f82ba261"],
    "resnext50_32x4d": ["7cdf4587", "1a0047aa"],
    "resnext101_32x8d": ["8ba56ff5", "110c445d"],
    "resnext101_64x4d": ["173b62eb"],
    "wide_resnet50_2": ["95faca4d", "9ba9bcbe"],
    "wide_resnet101_2": ["32ee1156", "d733dc28"],
    "vgg16": ["397923af"],
    "vgg16_bn": ["6c64b313"],
    "vgg19": ["dcbb9e9d"],
    "vgg19_bn": ["c79401a0"],
}
TORCHVISION_FILES = {
    model: {
        f"IMAGENET1K_V{version}": f"{model}-{digits}.pth"
        for version, digits in enumerate(checksums, start=1)
    }
    for model, checksums in _CHECKSUMS.items()
}
"""File names by model and weights; they end in the first digits of their SHA-256."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")

_TIMEOUT_SECONDS = 30

_FORMS = (
    "give the path of a file, hf-hub:OWNER/NAME[@REVISION] or "
    "torchvision:MODEL[.WEIGHTS]"
)


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """Returns the file of weights for a path or a name; downloads it if needed.

    Downloads go to Hugging Face's cache, or to resnet_jax in XDG_CACHE_HOME. Nothing is
    printed.

    Args:
      path_or_name: a file's path; ``hf-hub:OWNER/NAME[@REVISION]`` for that
        repository's model.safetensors or else pytorch_model.bin; or
        ``torchvision:MODEL[.WEIGHTS]``, IMAGENET1K_V1 by default.

    Raises:
      UserError: there is no such file or name, or the download fails.
    """
    name = os.fspath(path_or_name)
    path = expand(name)
    if path.is_file():
        return path
    if name.startswith(HUB_PREFIX):
        file = _from_hub(name, _HUB_FILES)
        if file is None:
            raise UserError(
                f"{name} has neither {' nor '.join(_HUB_FILES)}; give a repository "
                "with weights, or the path of a file"
            )
        return file
    if name.startswith(TORCHVISION_PREFIX):
        return _from_torchvision(name)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        raise UserError(
            f"{name} is the workdir of a run: resnet-jax convert {name} "
            f"{path.name}.safetensors writes its weights to a file"
        )
    if path.is_dir():
        raise UserError(f"weights {name} is a folder; give the path of a file in it")
    model = name.partition(".")[0]
    if model in TORCHVISION_FILES:
        raise UserError(
            f"there is no file {name}; did you mean {TORCHVISION_PREFIX}{name}?"
        )
    raise UserError(f"there is no file of weights {name!r}; {_FORMS}")


def _from_torchvision(name: str) -> Path:
    """One of torchvision's files in the cache, with its checksum verified."""
    model, _, weights = name.removeprefix(TORCHVISION_PREFIX).partition(".")
    if model not in TORCHVISION_FILES:
        raise UserError(
            f"{name}: no torchvision weights are known for {model!r}; "
            f"{nearest(model, TORCHVISION_FILES)}"
        )
    versions = TORCHVISION_FILES[model]
    weights = weights or "IMAGENET1K_V1"
    if weights not in versions:
        raise UserError(
            f"{name}: {model} has no weights {weights!r}; {nearest(weights, versions)}"
        )
    file_name = versions[weights]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    target = Path(cache) / "resnet_jax" / file_name
    if not target.is_file() or _checksum(target) != _expected_checksum(file_name):
        _download(name, TORCHVISION_ADDRESS + file_name, target)
    return target


def _expected_checksum(file_name: str) -> str:
    """The first digits of the SHA-256, as in resnet18-f37072fd.pth."""
    return file_name.rpartition("-")[2].partition(".")[0]


def _checksum(file: Path) -> str:
    """The first 8 digits of the file's SHA-256."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:8]


def _download(name: str, address: str, target: Path) -> None:
    """Downloads a file; ``target`` changes only once the checksum matches."""
    request = urllib.request.Request(address, headers={"User-Agent": "resnet_jax"})
    expected = _expected_checksum(target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
            replacing(target) as temporary,
        ):
            with temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            if (found := _checksum(temporary)) != expected:
                raise UserError(
                    f"{name} arrived incomplete or changed from {address}: its SHA-256 "
                    f"begins {found}, not {expected}; try again, or give the path of a "
                    "file"
                )
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{name} cannot be downloaded from {address} to {target.parent} "
            f"({_one_line(error)}); download it elsewhere and give the file's path"
        ) from error


def hub_config(name: str) -> dict[str, Any]:
    """The config.json beside the weights ``hf-hub:...``; empty if there is none.

    timm writes it: "architecture" and "pretrained_cfg", with sizes and pixel
    statistics.

    Raises:
      UserError: the repository cannot be reached.
    """
    path = _from_hub(name, ("config.json",))
    try:
        content = json.loads(path.read_text("utf-8")) if path else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _from_hub(name: str, file_names: Sequence[str]) -> Path | None:
    """The first of some files of a repository of the Hugging Face Hub, in its cache.

    None if it has none of them.
    """
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repository):
        raise UserError(
            f"{name} is not a repository's name; give {HUB_PREFIX}OWNER/NAME or "
            f"{HUB_PREFIX}OWNER/NAME@REVISION"
        )
    import huggingface_hub as hub  # slow to import
    from huggingface_hub import errors

    unreachable = False
    for file_name in file_names:
        try:
            with _quiet():
                return Path(
                    hub.hf_hub_download(
                        repository,
                        file_name,
                        revision=revision or None,
                        # The other file may still be in the cache.
                        local_files_only=unreachable,
                    )
                )
        except errors.LocalEntryNotFoundError:  # a subclass of the next
            unreachable = True
        except errors.EntryNotFoundError:
            pass
        # Its HTTP library, which has changed before, may raise anything.
        except Exception as error:
            raise UserError(
                f"{name} cannot be downloaded ({_one_line(error)}); check the name, "
                "log in with hf auth login, or give the path of a file"
            ) from error
    if unreachable:
        raise UserError(
            f"{name} is not in the cache and the Hugging Face Hub cannot be reached; "
            "check the network, or give the path of a file"
        )
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of huggingface_hub."""
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    had_bars = not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if had_bars:
            utils.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
