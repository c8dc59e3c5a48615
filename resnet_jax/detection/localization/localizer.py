"""Training and testing a localisation net."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax import parallel
from resnet_jax.data.order import Order
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.localization.crops import Crops
from resnet_jax.detection.localization.error import localization_error
from resnet_jax.detection.localization.net import (
    LocalizationNet,
    best_boxes,
    localization_loss,
)
from resnet_jax.detection.localization.views import padded, view_batches
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.outputs import normalized

ANCHORS = Anchors(sizes=(64, 128, 224), stride=32)
"""For 224x224 crops; the paper does not give its sizes."""


@dataclasses.dataclass(frozen=True)
class Localizer:
    """A trained localisation net.

    Attributes:
      net: the module.
      variables: its params and batch_stats.
      statistics: of the pixels.
      anchors: of the map.
      losses: float32 (steps,), the training loss.
    """

    net: LocalizationNet
    variables: dict[str, Any]
    statistics: PixelStatistics
    anchors: Anchors
    losses: np.ndarray

    @functools.cached_property
    def program(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """``best_boxes``, compiled: of uint8 images, sizes and classes."""
        find = functools.partial(best_boxes, self.net, self.anchors)

        @jax.jit
        def run(variables, images, sizes, classes):
            pixels = normalized(images, self.statistics, sizes)
            return find(variables, pixels, sizes, classes)

        return functools.partial(run, self.variables)


def train_localizer(
    net: TrainedNet,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    classes: np.ndarray,
    num_classes: int,
    *,
    steps: int,
    learning_rate: float | optax.Schedule,
    batch_size: int = 256,
    size: int = 224,
    shorter_sides: tuple[int, int] = (256, 480),
    anchors: Anchors = ANCHORS,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    seed: int = 0,
    num_threads: int = 8,
) -> Localizer:
    """Fine-tunes a classification net to localise, on random crops (appendix C).

    The net keeps its batch normalisation's running statistics. Crops and flips follow
    section 3.4, without the colours. A crop keeps the boxes of which it shows half.
    The result depends on ``seed``, not on the devices or threads.

    Args:
      net: from ``load_net``; its classifier is dropped.
      images: n arrays, uint8 (h, w, channels); read when they are due, several at a
        time, so a sequence may decode files.
      boxes: n arrays (g, 4), g above 0: the objects of the image's class.
      classes: integers (n,), one class for each image, from 0.
      num_classes: K.
      steps: of SGD.
      learning_rate: a number, or a function of the step.
      batch_size: images in a step; must divide over the devices.
      size: side of the crops in pixels.
      shorter_sides: the range of the image's shorter side before the crop.
      anchors: their stride must be that of the net's last map.
      momentum: of SGD.
      weight_decay: on all parameters.
      seed: of the heads, crops and samples.
      num_threads: that read and crop images.

    Raises:
      UserError: the inputs do not fit together, or the loss is not finite.
    """
    _check(images, boxes, classes, num_classes)
    data = Crops(images, boxes, classes, size, shorter_sides, Order(len(images), seed))
    module, variables = _with_heads(net, num_classes, anchors, size, seed)
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum)
    )
    mesh = parallel.data_mesh()
    if batch_size % mesh.size:
        raise UserError(
            f"batch_size={batch_size} does not divide over {mesh.size} devices"
        )
    step = make_train_step(module, net.statistics, anchors, optimizer)
    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    state = jax.device_put((variables, optimizer.init(variables["params"])), same)
    key, losses = jax.random.key(seed), []
    for number, batch in enumerate(data.batches(steps, batch_size, num_threads)):
        batch = jax.device_put(batch, cut)
        *state, loss = step(*state, jax.random.fold_in(key, number), batch)
        losses.append(parallel.settled(loss))
    values = np.array(jax.device_get(losses), np.float32)
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values)))
        raise UserError(f"the loss of step {first} is not finite: learn more slowly")
    return Localizer(module, state[0], net.statistics, anchors, values)


def make_train_step(
    net: LocalizationNet,
    statistics: PixelStatistics,
    anchors: Anchors,
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The jitted step: (variables, opt_state, key, batch) to the next two and the loss.

    A batch has ``images`` uint8 (B, size, size, channels), ``boxes`` float32
    (B, G, 4), ``present`` bool (B, G) and ``classes`` int32 (B,).
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, opt_state, key, batch):
        images = normalized(batch["images"], statistics)
        objects = batch["boxes"], batch["present"], batch["classes"]

        def loss_of(params):
            new = variables | {"params": params}
            return localization_loss(net, anchors, new, key, images, *objects)

        params = variables["params"]
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        return variables | {"params": params}, opt_state, loss

    return step


def localize(
    localizer: Localizer,
    images: Sequence[np.ndarray],
    classes: np.ndarray,
    *,
    shorter_sides: Sequence[int] = (256,),
    crop: int | None = 224,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """The best box of each class asked for, over all scales.

    The defaults are the paper's centre crop. Its dense test is ``crop=None`` with
    several scales, such as ``data.views.FULL_IMAGE_SCALES``.

    Args:
      localizer: from ``train_localizer``.
      images: n arrays, uint8 (h, w, channels).
      classes: integers (n, k).
      shorter_sides: to which images are resized, in pixels.
      crop: side of the centre crop; None takes the whole image.
      batch_size: views in a batch, rounded up to divide over the devices.

    Returns:
      Boxes float32 (n, k, 4) in pixels of the image given, and logits float32 (n, k).

    Raises:
      UserError: the crop is larger than a shorter side, or a class is unknown.
    """
    _check_classes("classes", classes, (len(images), -1), localizer.net.num_classes)
    if crop is not None and min(shorter_sides) < crop:
        raise UserError(
            f"a crop of {crop} needs shorter sides of at least {crop} pixels, not "
            f"{min(shorter_sides)}"
        )
    mesh = parallel.data_mesh()
    cut, batch_size = parallel.batch_sharding(mesh), parallel.round_up(batch_size, mesh)
    boxes = np.zeros((*classes.shape, 4), np.float32)
    scores = np.full(classes.shape, -np.inf, np.float32)
    for batch in view_batches(images, shorter_sides, crop, batch_size):
        filled = batch + batch[:1] * (batch_size - len(batch))
        pixels = np.stack([padded(view.pixels) for view in filled])
        sizes = np.array([view.pixels.shape[:2] for view in filled], np.int32)
        asked = classes[[view.index for view in filled]].astype(np.int32)
        given = jax.device_put((pixels, sizes, asked), cut)
        found = jax.device_get(localizer.program(*given))
        for view, box, score in zip(batch, *found, strict=False):
            better = score > scores[view.index]
            scores[view.index][better] = score[better]
            boxes[view.index][better] = view.placed(box)[better]
    return boxes, scores


def evaluate_localizer(
    localizer: Localizer,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    classes: np.ndarray,
    guesses: np.ndarray | None = None,
    **options: Any,
) -> dict[str, float]:
    """Localises images and counts the errors.

    Args:
      localizer: from ``train_localizer``.
      images: n arrays, as there.
      boxes: n arrays (g, 4).
      classes: integers (n,).
      guesses: integers (n, k), a classifier's likeliest classes, five in the paper's
        top-5 error. None tests with the true classes.
      **options: of ``localize``.

    Returns:
      See ``localization_error``.

    Raises:
      UserError: the inputs do not fit together.
    """
    _check(images, boxes, classes, localizer.net.num_classes)
    asked = np.asarray(classes)[:, None] if guesses is None else np.asarray(guesses)
    found, _ = localize(localizer, images, asked, **options)
    return localization_error(found, asked, boxes, classes)


def _with_heads(
    net: TrainedNet, num_classes: int, anchors: Anchors, size: int, seed: int
) -> tuple[LocalizationNet, dict[str, Any]]:
    """The module, and variables with the trained net's weights below fresh heads."""
    backbone: Any = net.model
    backbone = backbone.clone(num_classes=None)
    module = LocalizationNet(backbone, num_classes, anchors.per_cell)
    image = jnp.zeros((1, size, size, net.channels))
    stride = jax.eval_shape(
        functools.partial(backbone.apply, method="features"), net.variables, image
    )[-1].stride
    if stride != anchors.stride:
        raise UserError(
            f"the anchors have a stride of {anchors.stride} pixels, but the last map "
            f"of {net.name} has {stride}"
        )
    fresh = jax.jit(module.init)(jax.random.key(seed), image)
    variables = {
        name: {
            **tree,
            "backbone": {k: net.variables[name][k] for k in tree["backbone"]},
        }
        for name, tree in fresh.items()
    }
    # The step donates its buffers, and the net given is not to lose its own.
    return module, jax.tree.map(jnp.array, variables)


def _check(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    classes: np.ndarray,
    num_classes: int,
) -> None:
    """Raises UserError if images, boxes and classes do not fit together."""
    if not len(images) == len(boxes) == len(classes) > 0:
        raise UserError(
            f"there are {len(images)} images, {len(boxes)} arrays of boxes and "
            f"{len(classes)} classes: give one of each for every image"
        )
    _check_classes("classes", classes, (len(images),), num_classes)
    for index, each in enumerate(boxes):
        if np.ndim(each) != 2 or np.shape(each)[1] != 4 or not len(each):
            raise UserError(
                f"the boxes of image {index} must be (g, 4) with g above 0, not "
                f"{np.shape(each)}: leave images without boxes out"
            )
        if not (np.isfinite(each).all() and (each[:, 2:] > each[:, :2]).all()):
            raise UserError(
                f"the boxes of image {index} must be finite x1, y1, x2, y2 with x1 "
                "below x2 and y1 below y2"
            )


def _check_classes(
    name: str, classes: Any, shape: tuple[int, ...], num_classes: int
) -> None:
    """Raises UserError for a wrong shape (-1 is any size) or class."""
    classes = np.asarray(classes)
    fits = classes.ndim == len(shape) and classes.size > 0
    pairs = zip(shape, classes.shape, strict=False)
    if not fits or any(wanted not in (-1, given) for wanted, given in pairs):
        expected = ", ".join("k" if n == -1 else str(n) for n in shape)
        raise UserError(f"{name} must be ({expected}), not {classes.shape}")
    is_integer = np.issubdtype(classes.dtype, np.integer)
    if not is_integer or classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(
            f"{name} must be integers from 0 to {num_classes - 1}, not "
            f"{classes.dtype} from {classes.min()} to {classes.max()}"
        )
