r"""ResNet-20 on Fashion-MNIST: 60,000 grey images of 28x28 pixels.

resnet-jax train --config fashion_mnist --workdir runs/fashion_mnist \
    --config.data.path=/usr/share/datasets/fashion-mnist

The path holds the four idx files, gzipped or not (Debian's package
dataset-fashion-mnist installs them there). MNIST's files work too. Without a path,
tfds's fashion_mnist as ArrayRecord.
"""

from resnet_jax.config import default_config


def get_config(net="cifar_resnet20"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "fashion_mnist"
    config.augmentation.pad = 2
    config.augmentation.flip = True
    config.optimizer.learning_rate = 0.1
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (15, 22)
    config.training.epochs = 30
    config.training.global_batch_size = 128
    return config
