"""Deep residual learning (He et al. 2015) in JAX and Flax.

Every name imports what it needs when it is first used. ``create_model`` and
``list_models`` need jax and flax alone.
"""

from typing import TYPE_CHECKING, Any

from resnet_jax.errors import UserError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from resnet_jax.config import default_config, list_configs, load_config
    from resnet_jax.evaluation.classifier import Classifier
    from resnet_jax.evaluation.convert import convert_weights
    from resnet_jax.evaluation.evaluate import evaluate
    from resnet_jax.evaluation.nets import load_net
    from resnet_jax.evaluation.saved_run import load_run
    from resnet_jax.models import create_model, list_models
    from resnet_jax.prepare import prepare_dataset
    from resnet_jax.training.report import report
    from resnet_jax.training.show_data import show_data
    from resnet_jax.training.train import train
    from resnet_jax.weights import load_weights, save_weights

__all__ = [
    "Classifier",
    "UserError",
    "convert_weights",
    "create_model",
    "default_config",
    "evaluate",
    "list_configs",
    "list_models",
    "load_config",
    "load_net",
    "load_run",
    "load_weights",
    "prepare_dataset",
    "report",
    "save_weights",
    "show_data",
    "train",
]

_LAZY = {
    "create_model": "resnet_jax.models",
    "list_models": "resnet_jax.models",
    "default_config": "resnet_jax.config",
    "list_configs": "resnet_jax.config",
    "load_config": "resnet_jax.config",
    "prepare_dataset": "resnet_jax.prepare",
    "train": "resnet_jax.training.train",
    "Classifier": "resnet_jax.evaluation.classifier",
    "convert_weights": "resnet_jax.evaluation.convert",
    "load_net": "resnet_jax.evaluation.nets",
    "evaluate": "resnet_jax.evaluation.evaluate",
    "load_run": "resnet_jax.evaluation.saved_run",
    "report": "resnet_jax.training.report",
    "show_data": "resnet_jax.training.show_data",
    "load_weights": "resnet_jax.weights",
    "save_weights": "resnet_jax.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
