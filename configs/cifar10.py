"""The CIFAR-10 nets of He et al. 2015, section 4.2, with the paper's exact recipe.

resnet-jax train --config cifar10:cifar_resnet56 --workdir runs/resnet56

The argument is the net: cifar_resnet20 (default) to cifar_resnet1202, cifar_plain20 to
cifar_plain110, or any other CIFAR net of the catalog (`resnet-jax summary`), which
then trains with this paper's recipe.

Data: --config.data.path=FOLDER with CIFAR's binary files or train/CLASS/IMAGE and
test/CLASS/IMAGE. Without it, tfds's cifar10 as ArrayRecord.

Expected from the paper, test error after 64k steps of 128: 8.75 % (20 layers),
7.51 % (32), 7.17 % (44), 6.97 % (56), 6.43 % (110, best of 5; 6.61 +- 0.16), 7.93 %
(1202). Measured here: not measured.

The paper chose its schedule on a 45k/5k split: --config.data.holdout_examples=5000.
Its reported runs train on all 50,000 images.
"""

import re

from resnet_jax.config import default_config

# The depths published with a warm-up: 110 in the paper ("We use 0.01 to warm up the
# training until the training error is below 80 % (about 400 iterations), and then go
# back to 0.1"); 110, 164 and 1001 in the follow-up, for 400 steps. Every net of such a
# depth has the paper's, so that nets of equal depth share one recipe. The paper states
# none for 1202 layers.
WARMED_UP_DEPTHS = ("110", "164", "1001")


def get_config(net="cifar_resnet20"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    # The paper used two GPUs with 64 images each, and batch statistics per GPU.
    # Highway nets have no batch normalisation.
    if "highway" not in net:
        config.model.batch_norm_groups = 2
    config.data.name = "cifar10"
    config.data.normalization = "per_pixel_mean"
    config.augmentation.pad = 4
    config.augmentation.flip = True
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 1e-4
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_steps = (32_000, 48_000)
    config.schedule.factor = 0.1
    config.training.steps = 64_000
    config.training.global_batch_size = 128
    depth = re.search(r"(?:resnet|plain)([0-9]+)", net)
    if depth and depth[1] in WARMED_UP_DEPTHS:
        config.schedule.warmup_learning_rate = 0.01
        config.schedule.warmup_until_error = 0.8
    return config
