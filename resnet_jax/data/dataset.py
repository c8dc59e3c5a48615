"""Open the data set of a config: its splits and classes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from resnet_jax.config import Config
from resnet_jax.data.order import epoch_order
from resnet_jax.data.sources import (
    Collection,
    Relabelled,
    Subset,
    open_collection,
    open_sources,
)
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError
from resnet_jax.identity import Identity

_HOLDOUT_SEED = 1  # not the run's: every run holds out the same examples


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a data set.

    Attributes:
      train: the training examples, without the held-out ones.
      holdout: the held-out examples, for choosing; or None.
      test: the test examples, for the reported error only.
      class_names: in the order of the labels.
      identity: what distinguishes it from other data.
    """

    train: Split
    holdout: Split | None
    test: Split
    class_names: Sequence[str]
    identity: Identity

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c) of the model's input in training."""
        return self.train.training_shape


def open_dataset(
    config: Config,
    collection: Collection | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Opens the data set of a config.

    Args:
      config: of the run.
      collection: to open in place of the data that the config names.
      class_names: the order of the labels, if it is not the data's own. It applies if
        the names are the same.

    Raises:
      UserError: data are missing or contradict the config.
    """
    data = config.data
    collection = collection or open_collection(data)
    train, test, chosen_by = open_sources(data, collection)
    own = tuple(train.class_names)
    if class_names and own != tuple(class_names) and sorted(own) == sorted(class_names):
        train, test = Relabelled(train, class_names), Relabelled(test, class_names)
        chosen_by = chosen_by and Relabelled(chosen_by, class_names)
    holdout = None if chosen_by is None else Split("holdout", chosen_by, data)
    if data.holdout_examples:
        if data.holdout_examples >= len(train):
            raise UserError(
                f"data.holdout_examples={data.holdout_examples} leaves nothing of the "
                f"{len(train)} training examples; give a smaller number"
            )
        shuffled = epoch_order(len(train), _HOLDOUT_SEED, epoch=0)
        kept, rest = np.split(shuffled, [data.holdout_examples])
        holdout = Split("holdout", Subset(train, np.sort(kept)), data)
        train = Subset(train, np.sort(rest))
    description = collection.description
    if train.channels != 3:
        _refuse_colors(config)
    opened = Dataset(
        train=Split("train", train, data),
        holdout=holdout,
        test=Split("test", test, data),
        class_names=train.class_names,
        identity=Identity(
            kind=description.kind,
            version=description.checksum or description.version,
            class_names=tuple(train.class_names),
            counts={
                "train": len(train),
                "test": len(test),
                **({"holdout": len(holdout)} if holdout else {}),
            },
        ),
    )
    if opened.test.image_shape != opened.train.image_shape:
        raise UserError(
            f"the test images are {opened.test.image_shape} and the training images "
            f"{opened.train.image_shape}: set data.image_size"
        )
    return opened


def _refuse_colors(config: Config) -> None:
    """Raises UserError if a config needs colours, for grey images."""
    needs_color = {
        "augmentation.color_noise": config.augmentation.color_noise,
        "augmentation.color_jitter": config.augmentation.color_jitter,
        "data.normalization=imagenet": config.data.normalization == "imagenet",
    }
    for name, is_set in needs_color.items():
        if is_set:
            raise UserError(f"{name} needs colour images; these are grey")
