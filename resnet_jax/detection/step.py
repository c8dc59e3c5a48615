"""One training step of Faster R-CNN, as a jitted function of the global batch.

1. Normalise the images; the trunk and the RPN look at them.
2. On each device, choose the anchors and regions to learn from. The choice depends on
   the seed, the step and the image's place in the batch, not on the devices.
3. The losses of the RPN and of the head on these regions, and their gradients.
4. The update, the same as in classification.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax import parallel
from resnet_jax.config.detection import DetectorConfig
from resnet_jax.detection.faster_rcnn import FasterRCNN, prepared, propose_from
from resnet_jax.detection.losses import (
    AnchorSample,
    DetectionSums,
    RegionSample,
    anchor_places,
    head_losses,
    rpn_losses,
    sample_anchors,
    sample_regions,
)
from resnet_jax.detection.state import DetectionLearner
from resnet_jax.training.state import TrainState
from resnet_jax.training.step import Gradients, jitted, updated

_DROPOUT = 1
"""Folded into a step's key for the dropout of VGG's dense layers."""


def make_detection_step(learner: DetectionLearner) -> jax.stages.Wrapped:
    """A jitted function of (state, proposer, batch) to the next state.

    The old state is donated. ``proposer`` holds the variables of another detector that
    proposes the regions, or is None: the net proposes them itself. ``batch`` is one of
    ``batches.training_batches``.
    """
    model, mesh, procedure = (
        learner.model,
        learner.mesh,
        learner.config.training.procedure,
    )
    each_device = functools.partial(parallel.on_each_device, mesh=mesh)

    def train_step(state: TrainState, proposer: Any, batch: Any) -> TrainState:
        # 1. The images, and the keys of their samples.
        images = prepared(batch["images"], state.statistics)
        key = jax.random.fold_in(state.rng, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
        targets = {name: batch[name] for name in ("sizes", "boxes", "classes")}
        scores = None
        if proposer is not None:
            scores = model.apply(proposer, images, batch["sizes"], method=_scores)

        # 2 and 3. The gradients of the mean loss.
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            losses, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                targets,
                keys,
                each_device=each_device,
                scores=scores,
                trains_rpn=procedure != "fast_rcnn",
                trains_head=procedure != "rpn",
                method=training_losses,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, _DROPOUT)},
            )
            terms = (losses.rpn_loss, losses.rpn_box_loss)
            total = sum((*terms, losses.class_loss, losses.box_loss)) / len(images)
            return total, (losses, updates.get("batch_stats", {}))

        params = parallel.gathered(state.params, mesh)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (sums, batch_stats)), gradients = grad_fn(params)

        # 4. The update. No schedule of a detector depends on an error.
        found = Gradients(loss, gradients, sums, batch_stats)
        return updated(learner, state, found, jnp.zeros(()))

    return jitted(train_step, learner, parallel.batch_sharding(mesh))


def training_losses(
    net: FasterRCNN,
    images: jax.Array,
    targets: dict[str, jax.Array],
    keys: jax.Array,
    *,
    each_device: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f,
    scores: tuple[jax.Array, jax.Array] | None = None,
    trains_rpn: bool = True,
    trains_head: bool = True,
) -> DetectionSums:
    """The losses of a batch, summed over its images.

    Args:
      net: the bound net.
      images: (B, H, W, 3), normalised.
      targets: sizes (B, 2), boxes (B, G, 4) and classes (B, G), -1 for an absent one.
      keys: (B,), one for each image.
      each_device: applies a function to each device's part of a batch.
      scores: objectness and deltas by another net, whose proposals to use.
      trains_rpn: whether to compute the RPN's losses.
      trains_head: whether to compute the head's.
    """
    sizes, num_images = targets["sizes"], len(images)
    maps = net.features(images, sizes, train=True)
    objectness, deltas = net.rpn_of(maps, sizes)
    proposed_by = lax.stop_gradient(scores or (objectness, deltas))
    height, width = maps.shape[1:3]
    choose = functools.partial(
        _choose,
        anchors=net.anchors.grid(height, width),
        places=anchor_places(height, width, net.anchors.per_cell),
        config=net.config,
        num_classes=net.num_classes,
    )
    anchors, regions = each_device(choose)(
        keys, *proposed_by, net.present(maps, sizes), targets
    )
    zero = jnp.zeros(())
    losses: list[jax.Array] = [zero] * 4
    if trains_rpn:
        losses[:2] = (
            x.sum() for x in jax.vmap(rpn_losses)(objectness, deltas, anchors)
        )
    if trains_head:
        logits, deltas = net.classify(maps, regions.boxes, sizes, train=True)
        losses[2:] = (x.sum() for x in jax.vmap(head_losses)(logits, deltas, regions))
    is_object = (regions.labels >= 0) & (regions.labels < net.num_classes)
    objects = is_object.sum(dtype=jnp.int32)
    rpn, rpn_boxes, head, head_boxes = losses
    images_ = jnp.int32(num_images)
    return DetectionSums(rpn, rpn_boxes, head, head_boxes, objects, images_)


def _choose(
    keys: jax.Array,
    objectness: jax.Array,
    deltas: jax.Array,
    present: jax.Array,
    targets: dict[str, jax.Array],
    *,
    anchors: np.ndarray,
    places: np.ndarray,
    config: DetectorConfig,
    num_classes: int,
) -> tuple[AnchorSample, RegionSample]:
    """The anchors and regions to learn from, for each image of a batch."""

    def of_image(
        key: jax.Array,
        objectness: jax.Array,
        deltas: jax.Array,
        present: jax.Array,
        target: dict[str, jax.Array],
    ) -> tuple[AnchorSample, RegionSample]:
        size, boxes, classes = (target[n] for n in ("sizes", "boxes", "classes"))
        of_anchors, of_regions = jax.random.split(key)
        proposals = propose_from(
            config, anchors, objectness, deltas, present, size, train=True
        )
        grid, numbers = jnp.asarray(anchors), jnp.asarray(places)
        return (
            sample_anchors(
                of_anchors, grid, present, numbers, size, boxes, classes, config
            ),
            sample_regions(of_regions, proposals, boxes, classes, config, num_classes),
        )

    return jax.vmap(of_image)(keys, objectness, deltas, present, targets)


def _scores(
    net: FasterRCNN, images: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return net.rpn_of(net.features(images, sizes), sizes)
