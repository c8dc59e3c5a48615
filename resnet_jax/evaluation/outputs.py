"""Nets applied to images: the log-probabilities of each example, in one pass.

Each image is read and decoded once. Its views wait in pools of one shape; a full pool
is a batch. Views of whole images are padded to one of few shapes and computed exactly
(``models.masking``), so that few programs are compiled.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import DataConfig
from resnet_jax.data.feeds import read_ahead
from resnet_jax.data.sources import Source
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Average, MultiScale, Protocol, Stored
from resnet_jax.evaluation.reading import Look, ViewReader
from resnet_jax.models.masking import apply_masked, sizes_of_map
from resnet_jax.models.pooling import inside
from resnet_jax.models.resnet import ResNet

BATCH_SIZE = 64
"""Views of a net's own size in a batch, by default."""

_STRIDE = 32  # of the nets' last maps, at most
_ASPECTS = (1.0, 1.5, *(2.0**i * f for i in range(1, 12) for f in (1.0, 1.5)))
_IN_FLIGHT = 2  # batches that the devices compute while the host reads


@dataclasses.dataclass(frozen=True)
class Member:
    """A net and how it is tested.

    Attributes:
      columns: the logits to keep, in the order of the labels; None keeps all.
      features: compute the pooled features instead of log-probabilities.
    """

    net: TrainedNet
    protocol: Protocol
    columns: tuple[int, ...] | None = None
    features: bool = False

    @property
    def look(self) -> Look:
        """The views that it needs."""
        return self.protocol, self.net.channels

    def average(self, values: np.ndarray) -> np.ndarray:
        """The mean over views of what the program gave for each, (m, k) to (k,)."""
        if self.features:
            return values.mean(0)
        return average(values, self.protocol.average)

    @functools.cached_property
    def program(self) -> Callable[[Any, Any], jax.Array]:
        """A function of uint8 images (n, h, w, c) and sizes (n, 2): float32 (n, k).

        It belongs to the member, so that a later ``apply`` does not compile again.
        """
        return _program(self, parallel.local_mesh())


@dataclasses.dataclass(frozen=True)
class Output:
    """What the nets say about an image.

    Attributes:
      index: of the example.
      name: of its file.
      label: from the source.
      log_probs: float32 (members, classes), averaged over the views of each member; or
        (members, c), if the members ask for features.
    """

    index: int
    name: str
    label: int
    log_probs: np.ndarray


def apply(
    members: Sequence[Member],
    source: Source,
    *,
    data: DataConfig | None = None,
    batch_size: int = BATCH_SIZE,
    indices: Sequence[int] | None = None,
    on_fault: Callable[[str], object] | None = None,
) -> Iterator[Output]:
    """Applies nets to images on this process's devices.

    Yields outputs as they are finished: in order if all views have the same shape.
    Holds a few batches of images in memory.

    Args:
      members: the nets with their protocols.
      source: the images.
      data: its threads, processes and max_image_pixels are used.
      batch_size: views per batch, fewer of larger ones; does not affect results.
      indices: of the examples; None means all.
      on_fault: receives a sentence for each broken image, which is left out; None
        stops at the first one.

    Raises:
      UserError: an image is broken or does not fit a net or protocol.
    """
    data = data or DataConfig()
    indices = range(len(source)) if indices is None else indices
    mesh = parallel.local_mesh()
    looks = tuple(dict.fromkeys(member.look for member in members))
    limit = data.max_image_pixels
    reader = ViewReader(source, looks, indices, limit, on_fault is not None)
    ahead = max(data.threads, 2 * batch_size)
    batches = _Batches(members, looks, mesh, batch_size, len(indices))
    reading = read_ahead(reader, len(indices), ahead, data)
    try:
        for found in reading:
            if "fault" in found:
                on_fault(found["fault"])  # type: ignore[misc]
                continue
            batches.add(found)
            yield from batches.finished()
    finally:
        reading.close()
    batches.flush()
    yield from batches.finished()


def average(values: np.ndarray, how: Average) -> np.ndarray:
    """Log-probabilities (k,) of several views or nets, averaged as ``how`` says.

    Args:
      values: (m, k), log-probabilities or, with "logits", logits.
      how: "probabilities" or "logits".
    """
    if how == "logits":
        return _log_softmax(values.mean(0))
    if len(values) == 1:
        return values[0]
    largest = values.max(0)
    # A class that all views exclude keeps -inf.
    safe = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).mean(0)) + safe


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@dataclasses.dataclass
class _Waiting:
    """An image of which not all views are computed."""

    found: dict[str, Any]
    views: list[list[np.ndarray | None]]  # of each member

    @classmethod
    def of(cls, found: dict[str, Any], members: Sequence[Member]) -> "_Waiting":
        """An image of which no view is computed."""
        return cls(found, [[None] * member.protocol.num_views for member in members])

    @property
    def complete(self) -> bool:
        return all(view is not None for views in self.views for view in views)


_Place = tuple[int, int]
"""An example's index, and the number of one of its views."""


class _Batches:
    """Collects views in batches, computes them and puts the examples together."""

    def __init__(
        self,
        members: Sequence[Member],
        looks: Sequence[Look],
        mesh: Mesh,
        batch_size: int,
        num_examples: int,
    ):
        self._members, self._looks, self._mesh = members, looks, mesh
        self._programs = [member.program for member in members]
        self._batch_size, self._num_examples = batch_size, num_examples
        self._pools: dict[Any, list[tuple[_Place, np.ndarray]]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._queue: collections.deque[tuple[int, list[_Place], Any]]
        self._queue = collections.deque()
        self._done: list[int] = []
        self._stored: tuple[int, ...] | None = None  # height and width

    def add(self, found: dict[str, Any]) -> None:
        """Takes what a ``ViewReader`` read; computes the batches that are full."""
        self._waiting[found["index"]] = _Waiting.of(found, self._members)
        for look, images in zip(self._looks, found.pop("views"), strict=True):
            for number, image in enumerate(images):
                shape = self._shape(look[0], image, found["name"])
                pool = self._pools.setdefault((look, shape), [])
                pool.append(((found["index"], number), image))
                if len(pool) == self._capacity(look, shape):
                    self._compute(look, shape)

    def flush(self) -> None:
        """Computes what is left."""
        for look, shape in list(self._pools):
            self._compute(look, shape)
        self._collect(0)

    def finished(self) -> Iterator[Output]:
        """The examples whose last view was computed since the last call."""
        for index in self._done:
            waiting = self._waiting.pop(index)
            log_probs = [
                member.average(np.stack(views))  # type: ignore[arg-type]
                for member, views in zip(self._members, waiting.views, strict=True)
            ]
            found = waiting.found
            yield Output(index, found["name"], found["label"], np.stack(log_probs))
        self._done = []

    def _shape(
        self, protocol: Protocol, image: np.ndarray, name: str
    ) -> tuple[int, ...]:
        """The shape of the batch's images for a view."""
        if isinstance(protocol, MultiScale):
            return *padded_size(*image.shape[:2]), image.shape[2]
        if isinstance(protocol, Stored):
            self._stored = self._stored or image.shape[:2]
            if image.shape[:2] != self._stored:
                raise UserError(
                    f"image {name} is {image.shape[1]}x{image.shape[0]} and the first "
                    f"is {self._stored[1]}x{self._stored[0]}: give a protocol that "
                    "resizes them, such as center:size=224,shorter_side=256"
                )
        return image.shape

    def _capacity(self, look: Look, shape: tuple[int, ...]) -> int:
        """Views per batch: fewer of large ones, so that batches need equal memory.

        Few images make batches of a power of two, so that few programs are compiled.
        """
        size = getattr(look[0], "size", None)
        share = min(1.0, size**2 / math.prod(shape[:2])) if size else 1.0
        views = 1 << (self._num_examples * look[0].num_views - 1).bit_length()
        wanted = max(1, min(int(self._batch_size * share), views))
        return parallel.round_up(wanted, self._mesh)

    def _compute(self, look: Look, shape: tuple[int, ...]) -> None:
        """Starts the programs of all members with this look; collects older results."""
        pool = self._pools.pop((look, shape))
        size = self._capacity(look, shape)
        images = np.zeros((size, *shape), np.uint8)
        sizes = np.ones((size, 2), np.int32)
        for row, (_, view) in enumerate(pool):
            height, width = view.shape[:2]
            images[row, :height, :width] = view
            sizes[row] = height, width
        cut = parallel.batch_sharding(self._mesh)
        batch = jax.device_put((images, sizes), cut)
        places = [place for place, _ in pool]
        for number, member in enumerate(self._members):
            if member.look == look:
                result = parallel.settled(self._programs[number](*batch))
                self._queue.append((number, places, result))
        self._collect(_IN_FLIGHT * len(self._members))

    def _collect(self, still_waiting: int) -> None:
        """Takes results until ``still_waiting`` are left."""
        while len(self._queue) > still_waiting:
            number, places, result = self._queue.popleft()
            for (index, view), values in zip(places, np.asarray(result), strict=False):
                waiting = self._waiting[index]
                waiting.views[number][view] = values
                if waiting.complete:
                    self._done.append(index)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """The padded height and width of a whole image, one of few.

    Multiples of 32 pixels, with the longer side 1, 1.5, 2, 3, 4, 6, ... times the
    shorter one.
    """
    shorter, longer = sorted((height, width))
    shorter = -(-shorter // _STRIDE) * _STRIDE
    sides = (math.ceil(shorter * aspect / _STRIDE) * _STRIDE for aspect in _ASPECTS)
    longer = next((s for s in sides if s >= longer), -(-longer // _STRIDE) * _STRIDE)
    return (shorter, longer) if height <= width else (longer, shorter)


def _program(member: Member, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """A function of uint8 images (n, h, w, c) and sizes (n, 2): float32 (n, k)."""
    net = member.net
    columns = None if member.columns is None else np.array(member.columns)
    forward = _forward(member)

    def run(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        own = sizes if isinstance(member.protocol, MultiScale) else None
        images = normalized(images, net.statistics, own)
        return forward(variables, images, sizes, columns)

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    jitted = jax.jit(run, in_shardings=(same, cut, cut), out_shardings=cut)
    variables = net.variables
    if jax.process_count() > 1:
        variables = jax.device_get(variables)
    return functools.partial(jitted, jax.device_put(variables, same))


def _forward(member: Member) -> Callable[..., jax.Array]:
    """A function of variables, normalised images, sizes and columns: (n, k)."""
    net, protocol = member.net, member.protocol
    model: Any = net.model.clone(num_classes=None) if member.features else net.model
    if isinstance(protocol, MultiScale) and protocol.pooling == "windows":
        if not isinstance(net.model, ResNet) or net.num_classes is None:
            raise UserError(f"{net.name} has no windows: use pooling=global")
        return functools.partial(_window_log_probs, net.model, protocol.size)

    def forward(
        variables: Any, images: jax.Array, sizes: jax.Array, columns: np.ndarray | None
    ) -> jax.Array:
        logits: Any
        try:
            if isinstance(protocol, MultiScale):
                logits = apply_masked(model, variables, images, sizes)
            else:
                logits = model.apply(variables, images, train=False)
        except (ValueError, FlaxError) as error:  # while the program is traced
            height, width = images.shape[1:3]
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{net.name} cannot take views of {width}x{height} pixels, give a "
                f"protocol with others: {reason}"
            ) from error
        logits = logits if columns is None else logits[:, columns]
        raw = member.features or protocol.average == "logits"
        return logits if raw else jax.nn.log_softmax(logits)

    return forward


def normalized(
    images: jax.Array, statistics: PixelStatistics, sizes: jax.Array | None = None
) -> jax.Array:
    """Uint8 images (n, h, w, c) as a net expects them.

    A mean image of another size is replaced by its mean colour.

    Args:
      images: padded below and to the right if ``sizes`` is given.
      statistics: of the pixels.
      sizes: integers (n, 2), height and width of each image without its padding.
    """
    height, width = np.shape(statistics.mean)[:2]
    padding = images.shape[1] - height, images.shape[2] - width
    unit = to_unit(images)
    if (height, width) == (1, 1) or (padding == (0, 0) and sizes is None):
        return normalize(unit, statistics)
    colour = jax.tree.map(
        lambda pixels: jnp.mean(pixels, (0, 1), keepdims=True), statistics
    )
    if sizes is None or min(padding) < 0:
        return normalize(unit, colour)
    around = ((0, padding[0]), (0, padding[1]), (0, 0))
    shape = np.shape(statistics.mean)
    whole = jax.tree.map(
        lambda pixels: jnp.pad(jnp.broadcast_to(pixels, shape), around, "edge"),
        statistics,
    )
    fits = (sizes == jnp.array([height, width])).all(-1)[:, None, None, None]
    return jnp.where(fits, normalize(unit, whole), normalize(unit, colour))


def _window_log_probs(
    model: ResNet,
    size: int,
    variables: Any,
    images: jax.Array,
    sizes: jax.Array,
    columns: np.ndarray | None,
) -> jax.Array:
    """The logarithm of the softmax averaged over all windows of the last map, (n, k).

    A window has the size of the last map of a training image of ``size`` pixels.
    """
    last = apply_masked(model, variables, images, sizes, method="features")[-1]
    window = -(-size // last.stride)
    maps = last.array.astype(jnp.float32)
    means = jax.lax.reduce_window(
        maps, 0.0, jax.lax.add, (1, window, window, 1), (1, 1, 1, 1), "valid"
    )
    head = variables["params"]["head"]
    logits = means / window**2 @ head["kernel"] + head["bias"]
    log_probs = jax.nn.log_softmax(logits if columns is None else logits[..., columns])
    windows = sizes_of_map(sizes, last.stride) - (window - 1)
    within = inside(log_probs, windows)
    total = jax.nn.logsumexp(jnp.where(within, log_probs, -jnp.inf), (1, 2))
    return total - jnp.log(jnp.prod(windows, axis=-1))[:, None]
