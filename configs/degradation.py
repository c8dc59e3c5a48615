"""Plain and residual nets on the digits: degradation (He et al. 2015, Fig. 1 and 6).

resnet-jax train --config degradation:cifar_plain56 --workdir runs/plain56

The argument is the net: cifar_plain20 (default), cifar_plain56, cifar_resnet20 and
cifar_resnet56 share one recipe. Training images are not augmented, so the training
error refers to 1,437 fixed images.

Measured here: training error in % over the last 30 of 500 steps, and test error in % of
360 images, seeds 0, 1 and 2:

                     training error         test error
  cifar_plain20       0.00  0.00  0.00     1.94  1.39  2.22
  cifar_plain56      45.99 37.29 53.07    49.17 42.50 52.50
  cifar_resnet20      0.00  0.00  0.00     1.39  1.39  2.22
  cifar_resnet56      0.00  0.00  0.00     1.67  1.94  2.50

The deeper plain net does train, but slowly: after 1,000 steps at the rate 0.1 it was
still at 30.26 % (one seed). The table compares nets after equal numbers of steps, not
at convergence.

The rate was chosen by the training error. Rates of 0.02 and 0.1 show the same effect:
plain56 ends at 64 % (0.02) and at 29 to 47 % (0.1). At 0.1 resnet56 once rose to 43 %
during training; at 0.05 it ends at 0 with all three seeds.
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
