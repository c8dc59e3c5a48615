"""A trained net as a function of pictures: the likeliest classes of each."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from resnet_jax.data.pictures import Picture, Pictures, is_picture
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.errors import UserError
from resnet_jax.evaluation import outputs
from resnet_jax.evaluation.nets import TrainedNet, load_net
from resnet_jax.evaluation.outputs import Member, Output
from resnet_jax.evaluation.protocols import Protocol, as_protocol

_AT_ONCE = 1024  # pictures of an iterator that are in memory


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, the likeliest first.

    Attributes:
      image: the picture's path, or "image 3".
      classes: indices of the classes.
      names: readable names of the classes; their indices if names are unknown.
      probabilities: of these among all classes.
    """

    image: str
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        found = zip(self.names, self.probabilities, strict=True)
        return f"{self.image}: " + ", ".join(f"{n} {100 * p:.1f} %" for n, p in found)


class Classifier:
    """Predicts the classes of pictures with a trained net.

    ```python
    classifier = resnet_jax.Classifier.from_pretrained("torchvision:resnet50")
    for prediction in classifier(["cat.jpg", "dog.png"]):
        print(prediction)
    ```

    Programs are compiled once, for the first pictures of a shape and batch size.

    Attributes:
      net: the trained net.
      own_view: the net's own view of a picture.
      protocol: the views of a picture whose outputs are averaged.
      names: readable names of all classes.
    """

    def __init__(self, net: TrainedNet, protocol: Protocol | str | None = None):
        """See ``from_pretrained``.

        Args:
          net: from ``load_net``.
          protocol: the views of each picture, such as "ten_crop"; see
            ``evaluation.protocols``. None means the net's own single view. For a net
            that was trained on images as stored, pictures are resized to its mean
            image; if it has none, all pictures must have the same size.

        Raises:
          UserError: the net has no classifier, or there is no such protocol.
        """
        if net.num_classes is None:
            raise UserError(f"{net.source} has no classifier: give a net with classes")
        self.net, self.own_view = net, net.sized_view
        self.protocol = as_protocol(protocol, self.own_view)
        self.names = readable_names(
            net.class_names or [str(index) for index in range(net.num_classes)]
        )
        if len(self.names) != net.num_classes:
            raise UserError(
                f"{net.source} names {len(self.names)} classes, but its net has "
                f"{net.num_classes}: save it again with the right names"
            )
        self._member = Member(net, self.protocol)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        protocol: Protocol | str | None = None,
        **options: Any,
    ) -> Self:
        """A classifier with the net of a run, of a file or of a hub.

        Args:
          source: the workdir of a run, a file of weights, or a name such as
            "torchvision:resnet50" or "hf-hub:timm/resnet18.a1_in1k".
          protocol: the views of each picture, such as "ten_crop"; see ``Classifier``.
          **options: of ``load_net``: model, checkpoint, mean, std.

        Raises:
          UserError: there is no such net or protocol, or the net does not say what
            images it expects.
        """
        return cls(load_net(source, **options), protocol)

    def __call__(
        self, images: Picture | Iterable[Picture], top: int = 5
    ) -> list[Prediction]:
        """The likeliest classes of each picture, in the order given.

        Pictures are turned upright as their EXIF says. (Images of data sets are not,
        because they were labelled without it.) Grey and colour pictures are converted
        to what the net takes.

        Args:
          images: a picture or any number of them: paths, Pillow images, or uint8
            arrays (h, w) or (h, w, c) with 1, 3 or 4 channels. One array (n, h, w, c)
            is n pictures. An iterator is read in parts.
          top: the number of classes, at most all.

        Raises:
          UserError: names a picture that is broken or none of these.
        """
        return list(self.stream(images, top))

    def stream(
        self,
        images: Picture | Iterable[Picture],
        top: int = 5,
        on_fault: Callable[[str], object] | None = None,
    ) -> Iterator[Prediction]:
        """Like a call, but yields predictions in order, as they are computed.

        Holds few pictures in memory.

        Args:
          images: see ``__call__``.
          top: see ``__call__``.
          on_fault: receives a sentence for each broken picture, which is left out; None
            stops at the first one.
        """
        if top < 1:
            raise UserError(f"top is the number of classes, at least 1, not {top}")
        for start, some in _parts([images] if is_picture(images) else images):
            source = Pictures(
                some, self.net.channels, self.protocol.shorter_sides_used, start
            )
            found = outputs.apply([self._member], source, on_fault=on_fault)
            yield from _in_order(found, source.broken, lambda o: self._best(o, top))

    def _best(self, output: Output, top: int) -> Prediction:
        log_probs = output.log_probs[0]
        classes = np.argsort(-log_probs, kind="stable")[:top]
        return Prediction(
            image=output.name,
            classes=tuple(map(int, classes)),
            names=tuple(self.names[index] for index in classes),
            probabilities=tuple(map(float, np.exp(log_probs[classes]))),
        )


def _parts(images: Any) -> Iterator[tuple[int, Sequence[Picture]]]:
    """A sequence as it is; another iterable in parts, each with its first number."""
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        if len(images):
            yield 0, images
        return
    try:
        iterator = iter(images)
    except TypeError:
        raise UserError(
            f"got {type(images).__name__}: give a path, a Pillow image, an array of "
            "uint8, or several of them"
        ) from None
    start = 0
    while some := list(itertools.islice(iterator, _AT_ONCE)):
        yield start, some
        start += len(some)


def _in_order(
    found: Iterable[Output],
    broken: set[int],
    predict: Callable[[Output], Prediction],
) -> Iterator[Prediction]:
    """Predictions by index, each as soon as all before it are there or broken."""
    waiting: dict[int, Prediction] = {}
    position = 0
    for output in found:
        waiting[output.index] = predict(output)
        while position in waiting or position in broken:
            if position in waiting:
                yield waiting.pop(position)
            position += 1
    for index in sorted(waiting):
        yield waiting[index]
