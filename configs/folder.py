r"""A net on your own images: a folder of class folders, or the output of prepare.

resnet-jax train --config folder:resnet18 --workdir runs/mine \
    --config.data.path=/data/mine --config.data.name=mine

The path holds train/CLASS/IMAGE and test/CLASS/IMAGE, in any sizes. To split a single
folder of classes, /data/mine/all:

  --config.data.train_split='all[:90%]' --config.data.test_split='all[90%:]'

Such a split follows the order of classes and files. The output of `resnet-jax prepare`
is shuffled, so its parts contain all classes. For larger images set data.image_size and
data.eval_shorter_side. augmentation.crop_area sets the smallest share of an image that
still shows its class.

A generic recipe, not tuned on any data set. Measured here: not measured.
"""

from resnet_jax.config import default_config


def get_config(net="resnet18"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.normalization = "per_channel"
    config.data.statistics_examples = 10_000
    config.augmentation.crop_area = (0.25, 1.0)
    config.augmentation.flip = True
    config.optimizer.learning_rate = 0.1
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 2
    config.training.epochs = 30
    config.training.global_batch_size = 128
    return config
