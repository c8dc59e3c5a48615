r"""fb.resnet.torch (2016): 90 epochs with Inception crops and colour augmentation.

resnet-jax train --config recipes/fb2016:resnet50 --workdir runs/fb2016 \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is the net: resnet18, 34, 50 (default), 101, 152.

Source: https://github.com/facebookarchive/fb.resnet.torch (README.md, TRAINING.md,
opts.lua, train.lua, datasets/imagenet.lua, datasets/transforms.lua), the command for
four GPUs.

Expected from the source, top-1 error of one centre crop: 30.43 % (18 layers), 26.73 %
(34), 24.01 % (50), 22.44 % (101), 22.16 % (152). Measured here: not measured.

Differences from the original:
- A crop's log aspect ratio is uniform; the original's aspect ratio is uniform, and
  inverted for half of the crops.
- Crops are resized by this project's filter, not by Torch's bicubic one.
- The released ResNet-50 normalises after the addition; this net before it, as the
  source code does.
- Batches span epochs; no batch is shorter.
"""

from resnet_jax.config import default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    # Four GPUs with 64 images each: batch statistics were taken per GPU.
    config.model.batch_norm_groups = 4
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.eval_shorter_side = 256
    config.data.eval_interpolation = "bicubic"
    config.data.normalization = "imagenet"
    config.augmentation.crop_area = (0.08, 1.0)
    config.augmentation.crop_aspect = (3 / 4, 4 / 3)
    config.augmentation.flip = True
    config.augmentation.color_jitter = (0.4, 0.4, 0.4)
    config.augmentation.color_noise = 0.1
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.weight_decay_scope = "all"
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (30, 60)
    config.schedule.factor = 0.1
    config.training.epochs = 90
    config.training.global_batch_size = 256
    return config
