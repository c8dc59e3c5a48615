"""What a detector starts from: weights of a classifier, or of another detector."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from resnet_jax.config.detection import BackboneConfig
from resnet_jax.data.split import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.backbone import Backbone
from resnet_jax.detection.detector import load_detector
from resnet_jax.detection.state import DetectionLearner
from resnet_jax.detection.weights import holds_detector, read_detector
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import expected_pixels, is_workdir, load_net
from resnet_jax.run_files import CONFIG
from resnet_jax.weights import load_weights
from resnet_jax.workdir import Workdir


def initial_state(
    learner: DetectionLearner, tell: Callable[[str], None]
) -> tuple[PixelStatistics, dict[str, Any] | None]:
    """The pixel statistics of a run and its first variables; None: random ones.

    Parts that the weights lack, such as the RPN and the head of a classifier's, start
    at random, and ``tell`` names them.

    Raises:
      UserError: the weights cannot be read, or belong to another net.
    """
    config = learner.config.model
    if config.weights is None:
        return _imagenet(), None
    statistics, loaded = _loaded(config, learner.model.backbone)
    init = jax.jit(learner.init_variables)(jax.random.key(learner.config.seed))
    variables = jax.device_get({"batch_stats": {}} | init)
    new = []
    for part, fresh in variables["params"].items():
        if _shapes(loaded["params"].get(part)) == _shapes(fresh):
            for kind in ("params", "batch_stats"):
                if part in variables[kind]:
                    variables[kind][part] = loaded[kind][part]
        elif part in ("rpn", "head"):
            new.append(part)
        else:
            raise UserError(
                f"model.weights={config.weights} does not fit: its {part} differs from "
                f"that of {config.name} with these options"
            )
    if new:
        tell(f"random: {', '.join(new)}; the other parts are from {config.weights}")
    return statistics, variables


def proposer_of(learner: DetectionLearner) -> Any:
    """The variables of the net that proposes; None if the trained one does.

    Raises:
      UserError: ``training.proposals`` is no run of the same net.
    """
    workdir = learner.config.training.proposals
    if workdir is None:
        return None
    variables = load_detector(workdir).variables
    own = learner.abstract_state()
    wanted = {"params": own.params, "batch_stats": own.batch_stats}
    if _shapes(variables) != _shapes(wanted):
        raise UserError(
            f"training.proposals={workdir} is the run of another net; give one with "
            "the same model and detector fields"
        )
    return variables


def _loaded(
    config: BackboneConfig, backbone: Backbone
) -> tuple[PixelStatistics, dict[str, Any]]:
    """The pixel statistics and variables of a config's weights."""
    assert config.weights is not None
    if not is_workdir(config.weights) and holds_detector(config.weights):
        found = read_detector(config.weights)
        return found.statistics, found.variables
    if not is_workdir(config.weights):
        net: Any = backbone.net
        variables = load_weights(config.weights, net, new_head=net.num_classes == 1)
        pixels = None
        with contextlib.suppress(UserError):  # a net that is not in the catalog
            pixels = expected_pixels(config.weights, config.name)
        return pixels or _imagenet(), variables
    if is_detector(config.weights):
        detector = load_detector(config.weights)
        return jax.device_get((detector.statistics, detector.variables))
    trained = load_net(config.weights)
    if np.ndim(trained.statistics.mean) and np.shape(trained.statistics.mean)[0] > 1:
        raise UserError(
            f"the run in {config.weights} subtracts a mean image, which fits images of "
            "its own size alone: train with data.normalization=per_channel"
        )
    return jax.device_get((trained.statistics, trained.variables))


def is_detector(workdir: str) -> bool:
    """Whether a workdir holds the run of a detector."""
    saved = Workdir(workdir).read_json("config.json", CONFIG)
    return saved is not None and "detector" in saved["config"]


def _imagenet() -> PixelStatistics:
    return PixelStatistics(
        IMAGENET_MEAN.reshape(1, 1, 3), IMAGENET_STD.reshape(1, 1, 3)
    )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)
