"""Class activation maps: which regions of an image support a class.

Zhou et al. 2016, "Learning Deep Features for Discriminative Localization".
"""

from typing import Any

import cv2
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from resnet_jax.data.images import to_pillow
from resnet_jax.data.pictures import Picture, name_of, read_picture
from resnet_jax.errors import UserError
from resnet_jax.evaluation.classifier import Classifier
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.outputs import normalized
from resnet_jax.models.resnet import ResNet

_LEAST_SIDE = 160  # pixels of the longer side of a drawn map


def has_activation_maps(net: TrainedNet) -> bool:
    """Whether a net has class activation maps.

    It does if global average pooling and one dense layer follow its last map.
    """
    return isinstance(net.model, ResNet) and net.num_classes is not None


def class_activation_map(
    net: TrainedNet, images: jax.Array | np.ndarray, classes: jax.Array | np.ndarray
) -> jax.Array:
    """What each place of the last map adds to the logit of a class.

    The map of class k is the sum over the channels c of w[c, k] f[c], where f is the
    last map and w the classifier's kernel. Its mean and the classifier's bias for k add
    up to the logit.

    Args:
      net: see ``has_activation_maps``.
      images: uint8 (n, h, w, c), views as the net sees them.
      classes: integers (n,), a class for each image.

    Returns:
      Float32 (n, h / stride, w / stride), rounded up.

    Raises:
      UserError: the net has no such maps.
    """
    if not has_activation_maps(net):
        raise UserError(
            f"{net.name} has no class activation maps: they need a net that ends with "
            "global average pooling and one dense layer"
        )
    pixels = normalized(jnp.asarray(images), net.statistics)
    maps: Any = net.model.apply(net.variables, pixels, method="features")
    last = maps[-1].array
    weights = net.variables["params"]["head"]["kernel"][:, jnp.asarray(classes)]
    return jnp.einsum(
        "nhwc,cn->nhw", last.astype(jnp.float32), weights, precision="highest"
    )


def evidence(
    classifier: Classifier, picture: Picture, label: int | None = None
) -> np.ndarray:
    """A picture as its net sees it, in grey, with a class activation map over it.

    Args:
      classifier: of a net that has such maps.
      picture: a path, a Pillow image or uint8 pixels.
      label: the class; None means the likeliest.

    Returns:
      Uint8 (h, w, 3), as ``heat_over`` draws it.

    Raises:
      UserError: the net has no such maps, or the picture is broken.
    """
    net = classifier.net
    if label is None:
        label = classifier(picture, top=1)[0].classes[0]
    pixels = read_picture(picture, net.channels, name_of(picture, 0))
    view = classifier.own_view.views(pixels)[0]
    heat = class_activation_map(net, view[None], np.array([label]))[0]
    return heat_over(view, np.asarray(heat))


def heat_over(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map as colours over its view in grey.

    Args:
      view: uint8 (h, w, 1 or 3).
      heat: float (h', w'); places below 0 stay grey.

    Returns:
      Uint8 (s h, s w, 3), with s > 1 for views too small to see.
    """
    scale = -(-_LEAST_SIDE // max(view.shape[:2]))
    grey = np.asarray(to_pillow(view).convert("L"), np.float32)
    grey = grey.repeat(scale, 0).repeat(scale, 1)
    positive = np.maximum(heat, 0)
    strength = positive / max(float(positive.max()), 1e-12)
    size = grey.shape[1], grey.shape[0]
    strength = cv2.resize(strength, size, interpolation=cv2.INTER_LINEAR)[..., None]
    colors = matplotlib.colormaps["turbo"](0.2 + 0.7 * strength[..., 0])[..., :3] * 255
    opacity = 0.65 * strength
    mixed = (1 - opacity) * grey[..., None] + opacity * colors
    return np.rint(mixed).astype(np.uint8)
