"""Plain and highway nets of dense layers on MNIST, 10 to 100 layers deep.

resnet-jax train --config mnist:mnist_highway50 --workdir runs/highway50

The argument is the net: mnist_plain10, 20, 50, 100 or mnist_highway10, 20, 50, 100
(Srivastava et al. 2015, Figure 1). Data: --config.data.path=FOLDER with the four idx
files. Without it, tfds's mnist as ArrayRecord. Fashion-MNIST's files work too.

The paper publishes curves of the training loss: plain nets get worse with depth,
highway nets do not. It found the rate of each net by random search; here all nets
share one untuned recipe. Measured here: not measured.
"""

from resnet_jax.config import default_config


def get_config(net="mnist_highway10"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "mnist"
    config.data.normalization = "per_pixel_mean"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 0.0
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (200, 300)
    config.training.epochs = 400
    config.training.global_batch_size = 128
    return config
