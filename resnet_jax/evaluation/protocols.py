"""Test protocols: which views of an image a net sees, and how they are averaged.

A protocol is a small description. ``views`` cuts its uint8 views on the host, and
``evaluation.outputs`` applies nets to them. Several views per image are test-time
augmentation: do not compare such an error with that of a single view.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from resnet_jax.data import views
from resnet_jax.errors import UserError, nearest

Average = Literal["probabilities", "logits"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all protocols share.

    Attributes:
      average: average the softmax of each view, as the paper does, or the logits, as
        fb.resnet.torch does.
    """

    average: Average = dataclasses.field(default="probabilities", kw_only=True)

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """The uint8 views (h', w', c) of an image (h, w, c)."""
        raise NotImplementedError

    @property
    def num_views(self) -> int:
        """The number of views of an image."""
        raise NotImplementedError

    @property
    def shorter_sides_used(self) -> tuple[int, ...]:
        """The shorter sides to which an image is resized."""
        sides = getattr(self, "shorter_sides", None)
        return sides or tuple(filter(None, [getattr(self, "shorter_side", None)]))

    def describe(self) -> str:
        """One line: the kind and all fields, in the form that ``parse`` reads."""
        values = dataclasses.asdict(self)
        if self.num_views == 1:
            del values["average"]
        text = ",".join(f"{name}={_as_text(value)}" for name, value in values.items())
        return f"{_NAMES[type(self)]}:{text}" if text else _NAMES[type(self)]

    def to_json(self) -> dict[str, Any]:
        """The kind and all fields, for result files."""
        return {"kind": _NAMES[type(self)], **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Stored(Protocol):
    """The image as it is stored, such as CIFAR's 32x32 pixels.

    Attributes:
      flip: also its mirror image.
    """

    flip: bool = False

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """See ``Protocol``."""
        return _with_mirrors([image], self.flip)

    @property
    def num_views(self) -> int:
        """See ``Protocol``."""
        return 1 + self.flip


@dataclasses.dataclass(frozen=True)
class Center(Protocol):
    """The centre crop: the usual single view.

    Attributes:
      size: side of the crop, in pixels.
      shorter_side: of the image before the crop; torchvision's newer weights use 232,
        timm's floor(size / crop_pct).
      interpolation: "bilinear" or "bicubic", antialiased.
      flip: also the mirror image of the crop.
    """

    size: int = 224
    shorter_side: int = 256
    interpolation: str = "bilinear"
    flip: bool = False

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """See ``Protocol``."""
        crop = views.center_crop(
            image, self.shorter_side, self.size, self.interpolation
        )
        return _with_mirrors([crop], self.flip)

    @property
    def num_views(self) -> int:
        """See ``Protocol``."""
        return 1 + self.flip


@dataclasses.dataclass(frozen=True)
class TenCrop(Protocol):
    """Four corners, the centre, and their mirror images (the paper's Tables 2 and 3).

    Attributes:
      size, shorter_side, interpolation: as in ``Center``.
    """

    size: int = 224
    shorter_side: int = 256
    interpolation: str = "bilinear"

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """See ``Protocol``."""
        return list(
            views.ten_crop(image, self.shorter_side, self.size, self.interpolation)
        )

    @property
    def num_views(self) -> int:
        """See ``Protocol``."""
        return 10


@dataclasses.dataclass(frozen=True)
class MultiScale(Protocol):
    """Whole images at several scales, fully convolutional (the paper's Table 4).

    Attributes:
      shorter_sides: of the resized images, in pixels.
      interpolation: "bilinear" or "bicubic", antialiased.
      flip: also the mirror image at each scale.
      pooling: "global" gives the logits of the mean over the whole map. "windows" puts
        a window of the size of the training map at every place of the map, and
        averages the windows' softmaxes.
      size: side of the images in training, in pixels; for "windows".
    """

    shorter_sides: tuple[int, ...] = views.FULL_IMAGE_SCALES
    interpolation: str = "bilinear"
    flip: bool = True
    pooling: Literal["global", "windows"] = "global"
    size: int = 224

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """See ``Protocol``."""
        scales = [
            views.full_image(image, side, self.interpolation)
            for side in self.shorter_sides
        ]
        return _with_mirrors(scales, self.flip)

    @property
    def num_views(self) -> int:
        """See ``Protocol``."""
        return len(self.shorter_sides) * (1 + self.flip)


KINDS: dict[str, type[Protocol]] = {
    "stored": Stored,
    "center": Center,
    "ten_crop": TenCrop,
    "multi_scale": MultiScale,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def parse(text: str, own: Protocol) -> Protocol:
    """A protocol from text: ``KIND`` or ``KIND:FIELD=VALUE,FIELD=VALUE``.

    Args:
      text: such as "ten_crop:average=logits" or
        "multi_scale:shorter_sides=224+256,pooling=windows".
      own: the net's own single view. Fields that are not given are taken from it; the
        scales of "multi_scale" are the paper's in proportion to its size.

    Raises:
      UserError: an unknown kind or field, a wrong value, or a size that is unknown.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise UserError(f"there is no protocol {name!r}: {nearest(name, KINDS)}")
    kind = KINDS[name]
    values = _defaults(kind, own)
    for item in filter(None, rest.split(",")):
        field, equals, value = item.partition("=")
        known = {f.name: f for f in dataclasses.fields(kind)}
        if field not in known or not equals:
            raise UserError(
                f"protocol {text!r}: {name} has no field {field!r}; give FIELD=VALUE "
                f"with one of {', '.join(known)}"
            )
        values[field] = _from_text(text, field, typing.get_type_hints(kind), value)
    if isinstance(own, Stored):
        _refuse_unknown_size(text, name, values)
    return _checked(text, kind(**values))


def as_protocol(given: str | Protocol | None, own: Protocol) -> Protocol:
    """A protocol, from text if it is given so; None means the net's own single view.

    Raises:
      UserError: see ``parse``.
    """
    if given is None:
        return own
    return parse(given, own) if isinstance(given, str) else given


def _refuse_unknown_size(text: str, name: str, values: dict[str, Any]) -> None:
    """Raises UserError if a net of images as stored would get ImageNet's sizes."""
    windows = values.get("pooling") == "windows"
    wanted = {
        "center": ["size"],
        "ten_crop": ["size"],
        "multi_scale": ["shorter_sides", *(["size"] if windows else [])],
    }
    missing = [field for field in wanted.get(name, ()) if field not in values]
    if missing:
        example = ",".join(
            f"{field}={'32+40' if field == 'shorter_sides' else 32}"
            for field in missing
        )
        raise UserError(
            f"protocol {text!r}: the net takes images as they are stored, and their "
            f"size is unknown: give {' and '.join(missing)}, such as {name}:{example}"
        )
    if name in ("center", "ten_crop"):
        values.setdefault("shorter_side", values["size"])


def from_json(content: Mapping[str, Any]) -> Protocol:
    """The protocol whose ``to_json`` was saved.

    Raises:
      UserError: the content is damaged.
    """
    try:
        values = {name: content[name] for name in content if name != "kind"}
        if "shorter_sides" in values:
            values["shorter_sides"] = tuple(values["shorter_sides"])
        kind = KINDS[content["kind"]]
        return _checked(str(content), kind(**values))
    except (KeyError, TypeError) as error:
        raise UserError(f"{dict(content)!r:.200} is not a test protocol") from error


def _defaults(kind: type[Protocol], own: Protocol) -> dict[str, Any]:
    """The fields of the net's own view that another protocol has too."""
    names = {field.name for field in dataclasses.fields(kind)} - {"flip", "average"}
    values = {name: getattr(own, name) for name in names if hasattr(own, name)}
    size = getattr(own, "size", None)
    if "shorter_sides" in names and "shorter_sides" not in values and size:
        scales = (round(side * size / 224) for side in views.FULL_IMAGE_SCALES)
        values["shorter_sides"] = tuple(scales)
    return values


def _from_text(text: str, field: str, types: Mapping[str, Any], value: str) -> Any:
    """A field's value from text."""
    kind = types[field]
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if kind is int:
            return int(value)
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in value.split("+"))
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "an integer"}
        form = expected.get(kind, "integers joined by +, such as 224+256")
        raise UserError(
            f"protocol {text!r}: {field} must be {form}, not {value!r}"
        ) from None
    return value


_MOST_PIXELS = 8192


def _checked(text: str, protocol: Protocol) -> Protocol:
    values = dataclasses.asdict(protocol)
    choices = {
        "average": typing.get_args(Average),
        "interpolation": ("bilinear", "bicubic"),
        "pooling": ("global", "windows"),
    }
    for name, allowed in choices.items():
        if name in values and values[name] not in allowed:
            raise UserError(
                f"protocol {text!r}: {name} must be {' or '.join(allowed)}, not "
                f"{values[name]!r}"
            )
    size, sides = values.get("size", 1), values.get("shorter_sides")
    sides = sides if sides is not None else (values.get("shorter_side", size),)
    least = 1 if values.get("pooling") == "global" else size
    if not sides or not 1 <= size <= _MOST_PIXELS:
        raise UserError(f"protocol {text!r}: sizes range from 1 to {_MOST_PIXELS}")
    for side in sides:
        if not least <= side <= _MOST_PIXELS:
            raise UserError(
                f"protocol {text!r}: a shorter side ranges from {least} to "
                f"{_MOST_PIXELS} here, not {side}"
            )
    return protocol


def _with_mirrors(images: list[np.ndarray], flip: bool) -> list[np.ndarray]:
    """The images, and after each its mirror image if ``flip``."""
    if not flip:
        return images
    return [view for image in images for view in (image, image[:, ::-1])]


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
