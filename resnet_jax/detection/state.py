"""A detector with its optimizer, schedule and devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import DetectionConfig, derive
from resnet_jax.detection.backbone import frozen_parts
from resnet_jax.detection.faster_rcnn import FasterRCNN, make_detector
from resnet_jax.detection.losses import DetectionSums
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.schedule import Schedule
from resnet_jax.training.state import Learner


@dataclasses.dataclass(frozen=True)
class DetectionLearner(Learner):
    """The parts of a step; see ``Learner``. ``image_shape`` is that of a batch."""

    model: FasterRCNN

    def init_variables(self, key: jax.Array) -> dict[str, Any]:
        """See ``Learner``."""
        # Small: no variable depends on the image's size.
        sizes = jnp.full((1, 2), 64, jnp.int32)
        return dict(self.model.init(key, jnp.zeros((1, 64, 64, 3)), sizes))

    def zero_sums(self) -> DetectionSums:
        """See ``Learner``."""
        return DetectionSums.zeros()

    @property
    def has_mean_image(self) -> bool:
        """See ``Learner``."""
        return False


def make_detection_learner(
    config: DetectionConfig, mesh: Mesh, *, steps_per_epoch: int, num_classes: int
) -> DetectionLearner:
    """Builds the net, optimizer and schedule of a config.

    Raises:
      UserError: the batch does not divide over the devices, the backbone does not fit,
        or a frozen part does not exist.
    """
    batch = config.training.global_batch_size
    parallel.check_divides(batch, mesh.size)
    derived = derive(config, steps_per_epoch * batch)
    if config.evaluation.every_steps is None:
        derived = dataclasses.replace(derived, evaluate_every=derived.steps)
    model = make_detector(config, num_classes)
    return DetectionLearner(
        config=config,
        derived=derived,
        mesh=mesh,
        model=model,
        optimizer=make_optimizer(config.optimizer, untrained_parts(config, model)),
        schedule=Schedule(config.optimizer, config.schedule, derived),
        image_shape=(64, 64, 3),
    )


def untrained_parts(config: DetectionConfig, model: FasterRCNN) -> tuple[str, ...]:
    """The parts that are frozen, and those that the procedure does not reach."""
    unused = {"rpn": ("head", *model.tail_parts), "fast_rcnn": ("rpn",)}
    frozen = frozen_parts(config.model, model.backbone)
    return (*frozen, *unused.get(config.training.procedure, ()))
