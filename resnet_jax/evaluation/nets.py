"""Trained nets from runs, weights files and hubs."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from resnet_jax.config import Config
from resnet_jax.config.build import model_options
from resnet_jax.data.sources.imagenet import class_ids
from resnet_jax.data.split import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation.protocols import Center, Protocol, Stored, from_json
from resnet_jax.evaluation.saved_run import SavedRun, load_run
from resnet_jax.models.catalog import catalog_entry
from resnet_jax.storage import expand, is_remote
from resnet_jax.weights import shapes
from resnet_jax.weights.hub import HUB_PREFIX, TORCHVISION_PREFIX, hub_config
from resnet_jax.weights.load_save import KEPT_OPTIONS, NamedModel, load_named_model

PREPROCESSING = "preprocessing"
"""The key of a weights file's metadata that says what the net expects of an image."""

_NEWER_RESIZE = 232  # torchvision's V2 weights, and one net that came with them


@dataclasses.dataclass(frozen=True)
class TrainedNet:
    """A net with its weights, and what it expects of an image.

    Attributes:
      source: the workdir, file or hub name that it came from.
      name: in the catalog.
      options: of ``create_model``, those that change what the net computes.
      model: ``model.apply(variables, images)`` returns float32 logits (n, k).
      variables: params and batch_stats, on the devices.
      statistics: images are ``normalize(to_unit(uint8), statistics)``.
      protocol: its own single view of an image.
      class_names: in the order of the logits; None if unknown.
      run: the run that trained it; None for a file.
    """

    source: str
    name: str
    options: dict[str, Any]
    model: nn.Module
    variables: dict[str, Any]
    statistics: PixelStatistics
    protocol: Protocol
    class_names: tuple[str, ...] | None
    run: SavedRun | None = None

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.model.num_classes  # type: ignore[attr-defined]

    @property
    def channels(self) -> int:
        """Channels of the images: 1 for grey, 3 for colour."""
        return np.shape(self.statistics.mean)[-1]

    @property
    def sized_view(self) -> Protocol:
        """``protocol``; for images as stored, a view of the mean image's size."""
        height, width = np.shape(self.statistics.mean)[:2]
        if isinstance(self.protocol, Stored) and height == width > 1:
            return Center(height, height)
        return self.protocol

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of all arrays by name, in hexadecimal digits."""
        digest = hashlib.sha256()
        arrays = shapes.flatten(jax.device_get(self.variables), self.model)
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def preprocessing(self) -> dict[str, Any]:
        """What the net expects of an image, as JSON values for a weights file."""
        return {
            "mean": np.asarray(self.statistics.mean).tolist(),
            "std": np.asarray(self.statistics.std).tolist(),
            "protocol": self.protocol.to_json(),
            "class_names": self.class_names,
        }


def is_workdir(source: str | os.PathLike[str]) -> bool:
    """Whether a net's source is the workdir of a run, not a file or a hub name."""
    return is_remote(source) or expand(source).is_dir()


def load_net(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    checkpoint: int | str = "last",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> TrainedNet:
    """Loads a trained net and what it expects of an image.

    Args:
      source: the workdir of a run, a file of weights, or a name such as
        "torchvision:resnet50" or "hf-hub:timm/resnet18.a1_in1k".
      model: name in the catalog, for a file that does not contain it.
      checkpoint: of a run: "last", "best" or a step.
      mean: of each channel of pixels in [0, 1], for a file that does not contain it.
        The default for a net of ImageNet's size and colour images is ImageNet's.
      std: the standard deviations.
      overrides: of a run: where its data are now; see ``load_run``.

    Raises:
      UserError: there is no such net, or it does not say what images it expects.
    """
    if is_workdir(source):
        if model is not None or mean is not None or std is not None:
            raise UserError(
                f"workdir {source} knows its model, mean and std: leave them out"
            )
        return _of_run(source, load_run(source, checkpoint, overrides))
    hub = os.fspath(source).startswith((HUB_PREFIX, TORCHVISION_PREFIX))
    if not hub and os.sep in os.fspath(source) and not expand(source).exists():
        raise UserError(
            f"{source} does not exist; give the workdir of a run, a file of weights, "
            f"{HUB_PREFIX}OWNER/NAME or {TORCHVISION_PREFIX}MODEL"
        )
    if checkpoint != "last":
        raise UserError(
            f"{source} is not a workdir, and has no checkpoint {checkpoint}"
        )
    return _of_file(os.fspath(source), model, mean, std)


def _of_run(source: str | os.PathLike[str], run: SavedRun) -> TrainedNet:
    options, data = model_options(run.config.model), run.trained_on
    return TrainedNet(
        source=os.fspath(source),
        name=run.config.model.name,
        options={name: options[name] for name in options if name in KEPT_OPTIONS},
        model=run.model,
        variables={key: tree for key, tree in run.variables.items() if tree},
        statistics=run.statistics,
        protocol=_protocol_of(run.config),
        class_names=data.class_names if data else None,
        run=run,
    )


def _protocol_of(config: Config) -> Protocol:
    """The view of a run's own evaluation."""
    data = config.data
    size = data.eval_image_size or data.image_size
    if size is None:
        return Stored()
    return Center(size, data.eval_shorter_side or size, data.eval_interpolation)


def expected_pixels(source: str, name: str) -> PixelStatistics | None:
    """The pixels that published weights expect; None if nothing says.

    Args:
      source: a file of weights or a hub name.
      name: of the net in the catalog.

    Raises:
      UserError: the file cannot be read, or holds another net.
    """
    timm = hub_config(source) if source.startswith(HUB_PREFIX) else {}
    named = load_named_model(source, name)
    content = _content(source, named, timm)
    if content.keys().isdisjoint({"mean", "std"}):
        return None
    return _statistics(source, named, content["mean"], content["std"])


def _of_file(
    source: str,
    model: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> TrainedNet:
    timm = hub_config(source) if source.startswith(HUB_PREFIX) else {}
    named = load_named_model(source, model, suggested=timm.get("architecture"))
    if (mean is None) != (std is None):
        raise UserError("give both the mean and the std of the pixels, or neither")
    content = _content(source, named, timm)
    if mean is not None and std is not None:
        content |= {"mean": mean, "std": std}
    if content.keys().isdisjoint({"mean", "std"}):
        raise UserError(
            f"{source} does not say what images it expects: give the mean and std of "
            "its pixels in [0, 1], such as --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"
        )
    names = content.get("class_names")
    return TrainedNet(
        source=source,
        name=named.name,
        options=named.options,
        model=named.model,
        variables=dict(named.variables),
        statistics=_statistics(source, named, content["mean"], content["std"]),
        protocol=content["protocol"],
        class_names=None if names is None else tuple(names),
    )


def _content(source: str, named: NamedModel, timm: Mapping[str, Any]) -> dict[str, Any]:
    """What a file or its publisher says about the images it expects."""
    if PREPROCESSING in named.metadata:
        try:
            saved = json.loads(named.metadata[PREPROCESSING])
            return saved | {"protocol": from_json(saved["protocol"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{source} is damaged: its preprocessing cannot be read ({error})"
            ) from error
    entry = catalog_entry(named.name)
    on_imagenet = entry.image_size == 224
    content: dict[str, Any] = {"protocol": Center() if on_imagenet else Stored()}
    if on_imagenet and _input_channels(named) == 3:
        content |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if getattr(named.model, "num_classes", None) == len(class_ids()) and on_imagenet:
        content["class_names"] = class_ids()
    if source.startswith(TORCHVISION_PREFIX):
        newer = "V2" in source or "64x4d" in source
        content["protocol"] = Center(shorter_side=_NEWER_RESIZE if newer else 256)
    return content | _timm_content(timm)


def _timm_content(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing in timm's config.json: its training size and crop."""
    given = config.get("pretrained_cfg", {})
    if not {"mean", "std", "input_size"} <= given.keys():
        return {}
    size = int(given["input_size"][-1])
    shorter_side = int(size / given.get("crop_pct", 0.875))
    interpolation = given.get("interpolation", "bilinear")
    content = {
        "mean": given["mean"],
        "std": given["std"],
        "protocol": Center(size, shorter_side, interpolation),
    }
    names = config.get("label_names")
    return content | ({"class_names": names} if names else {})


def _statistics(source: str, named: NamedModel, mean: Any, std: Any) -> PixelStatistics:
    """Statistics from numbers for each channel, or from whole images of them."""
    channels = _input_channels(named)
    arrays = []
    for values in (mean, std):
        array = np.asarray(values, np.float32)
        array = array.reshape(1, 1, -1) if array.ndim == 1 else array
        if array.ndim != 3 or array.shape[2] != channels:
            raise UserError(
                f"{source} is for images of {channels} channels, but the mean or std "
                f"has the shape {array.shape}; give a number for each channel"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{source}: the mean and std of the pixels must be finite")
        arrays.append(array)
    if not (arrays[1] > 0).all():
        raise UserError("the std of the pixels must be above 0 in each channel")
    return PixelStatistics(*arrays)


def _input_channels(named: NamedModel) -> int:
    return shapes.input_channels(shapes.flatten(named.variables, named.model))
