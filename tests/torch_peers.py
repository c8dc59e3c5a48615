"""torchvision and timm as they are installed, for comparisons with their own nets."""

import importlib
import re
import sys

import pytest

torch = pytest.importorskip("torch")

_library = torch.library.Library("torchvision", "FRAGMENT")


def import_peer(name):
    """The module, or a skipped test where it is not installed.

    torchvision's registry build expects CUDA and, beside a CPU build of torch, fails
    to import for want of its detection operators. The nets need none of them: each
    one that it misses is declared, and the import tried again.
    """
    for _ in range(50):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed ({error})")
        except RuntimeError as error:
            missing = re.search(
                r"operator torchvision::(\w+) does not exist", str(error)
            )
            if missing is None:
                raise
            _library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for module in [
                m for m in sys.modules if m.split(".")[0] in (name, "torchvision")
            ]:
                del sys.modules[module]
    raise AssertionError(f"{name} cannot be imported")
