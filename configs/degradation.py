"""Plain and residual nets on the digits: degradation (He et al. 2015, Fig. 1 and 6).

resnet-jax train --config configs/degradation.py:cifar_plain56 --workdir runs/plain56

The argument is the net: cifar_plain20 (default), cifar_plain56, cifar_resnet20 and
cifar_resnet56 have one and the same recipe. Training images are not augmented, so that
the training error is that of 1,437 fixed images.

Seen, training error in % over the last 30 of 500 steps (means over batches as they were
trained on), seeds 0, 1 and 2, and test errors of 360 images:

                     training error         test error
  cifar_plain20       0.00  0.00  0.00     1.94  1.39  2.22
  cifar_plain56      45.99 37.29 53.07    49.17 42.50 52.50
  cifar_resnet20      0.00  0.00  0.00     1.39  1.39  2.22
  cifar_resnet56      0.00  0.00  0.00     1.67  1.94  2.50

The deeper plain net does train, but slowly: with 1,000 steps and the rate 0.1, one
seed, it was still at 30.26 %. So this shows a difference after equal steps, and says
nothing about what plain56 would reach in the end.

How it was settled, the training error in view: 500 steps of 64 with the rates 0.02 (two
nets, seed 0), 0.1 (four nets, seeds 0 to 2, and plain44) and then 0.05. All showed the
same: 56 plain layers ended at 64 % (0.02) and 29 to 47 % (0.1), 44 at 32 %, plain20 and
resnet20 at 0.05 % or less. At 0.1 resnet56 ended at 0.16, 0.00 and 0.26 % and once rose
to 43 % on its way, so 0.05 was taken, where it ended at 0 with all three seeds.
"""

from resnet_jax.config import default_config


def get_config(net="cifar_plain20"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.data.name = "digits"
    config.optimizer.learning_rate = 0.05
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 100
    config.training.steps = 500
    config.training.global_batch_size = 64
    config.training.log_every_steps = 10
    config.evaluation.every_steps = 50
    config.checkpoint.every_steps = 250
    return config
