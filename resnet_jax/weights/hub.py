"""Where weights are: a file's path, or a name that is downloaded once.

Two families of names are known. ``hf-hub:OWNER/NAME[@REVISION]`` is a repository of the
Hugging Face Hub, and ``torchvision:MODEL[.WEIGHTS]`` one of the files that torchvision
publishes.
"""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from resnet_jax.errors import UserError, nearest
from resnet_jax.weights.files import replacing

HUB_PREFIX = "hf-hub:"
TORCHVISION_PREFIX = "torchvision:"

TORCHVISION_ADDRESS = "https://download.pytorch.org/models/"
# File names by model and weights, as in torchvision 0.28. The digits at the end of each
# begin the file's SHA-256. VGG-16's IMAGENET1K_FEATURES are not here: they are no
# classifier's.
TORCHVISION_FILES = {
    "resnet18": {"IMAGENET1K_V1": "resnet18-f37072fd.pth"},
    "resnet34": {"IMAGENET1K_V1": "resnet34-b627a593.pth"},
    "resnet50": {
        "IMAGENET1K_V1": "resnet50-0676ba61.pth",
        "IMAGENET1K_V2": "resnet50-11ad3fa6.pth",
    },
    "resnet101": {
        "IMAGENET1K_V1": "resnet101-63fe2227.pth",
        "IMAGENET1K_V2": "resnet101-cd907fc2.pth",
    },
    "resnet152": {
        "IMAGENET1K_V1": "resnet152-394f9c45.pth",
        "IMAGENET1K_V2": "resnet152-f82ba261.pth",
    },
    "resnext50_32x4d": {
        "IMAGENET1K_V1": "resnext50_32x4d-7cdf4587.pth",
        "IMAGENET1K_V2": "resnext50_32x4d-1a0047aa.pth",
    },
    "resnext101_32x8d": {
        "IMAGENET1K_V1": "resnext101_32x8d-8ba56ff5.pth",
        "IMAGENET1K_V2": "resnext101_32x8d-110c445d.pth",
    },
    "resnext101_64x4d": {"IMAGENET1K_V1": "resnext101_64x4d-173b62eb.pth"},
    "wide_resnet50_2": {
        "IMAGENET1K_V1": "wide_resnet50_2-95faca4d.pth",
        "IMAGENET1K_V2": "wide_resnet50_2-9ba9bcbe.pth",
    },
    "wide_resnet101_2": {
        "IMAGENET1K_V1": "wide_resnet101_2-32ee1156.pth",
        "IMAGENET1K_V2": "wide_resnet101_2-d733dc28.pth",
    },
    "vgg16": {"IMAGENET1K_V1": "vgg16-397923af.pth"},
    "vgg16_bn": {"IMAGENET1K_V1": "vgg16_bn-6c64b313.pth"},
    "vgg19": {"IMAGENET1K_V1": "vgg19-dcbb9e9d.pth"},
    "vgg19_bn": {"IMAGENET1K_V1": "vgg19_bn-c79401a0.pth"},
}
_DEFAULT_WEIGHTS = "IMAGENET1K_V1"

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 2**20

_FORMS = (
    "give the path of a file, hf-hub:OWNER/NAME[@REVISION] or "
    "torchvision:MODEL[.WEIGHTS]"
)


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """The file of weights that a path or a name stands for; prints nothing.

    Args:
      path_or_name: a file's path; ``hf-hub:OWNER/NAME[@REVISION]``, which stands for
        model.safetensors of that repository, or else pytorch_model.bin; or
        ``torchvision:MODEL[.WEIGHTS]``, as ``torchvision:resnet50.IMAGENET1K_V2``, the
        first version where none is given. What a name stands for is downloaded, unless
        it is in the cache: Hugging Face's own, or resnet_jax in XDG_CACHE_HOME.

    Raises:
      UserError: there is no such file or name, or it cannot be downloaded.
    """
    name = os.fspath(path_or_name)
    path = Path(os.path.expanduser(name))
    if name and path.is_file():
        return path
    if name.startswith(HUB_PREFIX):
        return _from_hub(name)
    if name.startswith(TORCHVISION_PREFIX):
        return _from_torchvision(name)
    if name and path.is_dir():
        raise UserError(f"weights {name} is a folder; give the path of a file in it")
    model = name.partition(".")[0]
    if model in TORCHVISION_FILES:
        raise UserError(
            f"there is no file {name}; did you mean {TORCHVISION_PREFIX}{name}?"
        )
    raise UserError(f"there is no file of weights {name!r}; {_FORMS}")


def _from_torchvision(name: str) -> Path:
    """One of torchvision's files, in the cache and with its checksum compared."""
    model, _, weights = name.removeprefix(TORCHVISION_PREFIX).partition(".")
    if model not in TORCHVISION_FILES:
        raise UserError(
            f"{name}: torchvision has no weights here for {model!r}; "
            f"{nearest(model, TORCHVISION_FILES)}"
        )
    versions = TORCHVISION_FILES[model]
    weights = weights or _DEFAULT_WEIGHTS
    if weights not in versions:
        raise UserError(
            f"{name}: {model} has no weights {weights!r}; {nearest(weights, versions)}"
        )
    file_name = versions[weights]
    target = _cache_folder() / file_name
    if not (target.is_file() and _has_checksum(target)):
        _download(name, TORCHVISION_ADDRESS + file_name, target)
    return target


def _cache_folder() -> Path:
    """The folder of downloaded files, created where it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "resnet_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be created ({error.strerror}); set "
            "XDG_CACHE_HOME to a folder you can write to"
        ) from error
    return folder


def _expected_checksum(file_name: str) -> str:
    """The first digits of the SHA-256, which end the file's name."""
    match = re.search(r"-([0-9a-f]{8,})\.", file_name)
    if match is None:
        raise ValueError(f"{file_name} does not tell its checksum")
    return match[1]


def _has_checksum(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return False
    return digest.startswith(_expected_checksum(file.name))


def _download(name: str, address: str, target: Path) -> None:
    """Fetches a file; ``target`` is touched only once all of it is there and right."""
    digest = hashlib.sha256()
    request = urllib.request.Request(address, headers={"User-Agent": "resnet_jax"})
    try:
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
            replacing(target) as temporary,
        ):
            with temporary.open("wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            expected = _expected_checksum(target.name)
            if not digest.hexdigest().startswith(expected):
                raise UserError(
                    f"{name} came incomplete or changed from {address}: its SHA-256 "
                    f"begins {digest.hexdigest()[: len(expected)]}, not {expected}; "
                    "try again, or give the path of a file"
                )
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{name} cannot be downloaded from {address} to {target.parent} "
            f"({_one_line(error)}); download it elsewhere and give the file's path"
        ) from error


def _from_hub(name: str) -> Path:
    """The weights of a repository of the Hugging Face Hub, in its own cache."""
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repository):
        raise UserError(
            f"{name} is not the name of a repository; give "
            f"{HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME@REVISION"
        )
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{name} needs the package huggingface_hub ({_one_line(error)}); "
            "pip install huggingface_hub"
        ) from error
    unreachable = False
    for file_name in _HUB_FILES:
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
        # The order matters: some of these are kinds of others.
        except errors.LocalEntryNotFoundError:
            unreachable = True
        except errors.EntryNotFoundError:
            pass
        except errors.GatedRepoError as error:
            raise UserError(
                f"{name} is gated: accept its terms at huggingface.co/{repository} and "
                "log in with hf auth login"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"the Hugging Face Hub has no repository {repository}, or it is "
                "private; check the name, or log in with hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{repository} has no revision {revision!r}; give a branch, a tag or a "
                "commit that it has"
            ) from error
        # Whatever its transport, of which it has changed the library, may raise.
        except Exception as error:
            raise UserError(
                f"{name} cannot be downloaded ({_one_line(error)}); give the path of a "
                "file if that lasts"
            ) from error
    if unreachable:
        raise UserError(
            f"{name} is not in the cache and the Hugging Face Hub cannot be reached; "
            "check the network, or give the path of a file"
        )
    raise UserError(
        f"{repository} has neither {' nor '.join(_HUB_FILES)}; give a repository of "
        "weights, or the path of a file"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps huggingface_hub from drawing bars and warning, then it is as it was."""
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    has_bars = not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if has_bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if has_bars:
            utils.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
