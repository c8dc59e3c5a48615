r"""Wide residual nets on CIFAR-10 with their own recipe (Zagoruyko & Komodakis 2016).

resnet-jax train --config cifar10_wide:cifar_wide_resnet16_8 \
    --workdir runs/wide

The argument is the net: cifar_wide_resnet28_10 (default) or another
cifar_wide_resnet<6N+4>_<k>. Data: as configs/cifar10.py.

Expected from the paper, test error: 4.53 % (40-4), 4.27 % (16-8), 4.00 % (28-10),
3.89 % (28-10 with --config.model.dropout_rate=0.3). Measured here: not measured.

The recipe: Nesterov momentum, weight decay 5e-4, 200 epochs in batches of 128, a rate
of 0.1 multiplied by 0.2 at epochs 60, 120 and 160, and pixels normalised per channel.
The paper pads by reflection; here with zeros.
"""

from resnet_jax.config import default_config


def get_config(net="cifar_wide_resnet28_10"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "cifar10"
    config.data.normalization = "per_channel"
    config.augmentation.pad = 4
    config.augmentation.flip = True
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (60, 120, 160)
    config.schedule.factor = 0.2
    config.training.epochs = 200
    config.training.global_batch_size = 128
    return config
