r"""ImageNet in large batches: 8,192 images, a linear warm-up (Goyal et al. 2017).

resnet-jax train --config recipes/goyal2017:resnet50 --workdir runs/goyal \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is the net: resnet50 (default) or resnet101. For another batch size B,
the paper's linear rule: --config.training.global_batch_size=B,
--config.optimizer.learning_rate=0.1*B/256 and --config.model.batch_norm_groups=B/32;
up to 256 without a warm-up.

Source: sections 2 and 5.1 of https://arxiv.org/abs/1706.02677

Expected from the source, top-1 error: 23.74 +- 0.09 % (50 layers), 22.36 +- 0.09 %
(101), mean and standard deviation of 5 runs, of each the median of the last 5 epochs.
With batches of 256: 23.60 +- 0.12 % (50). Measured here: not measured.

Differences from the original:
- The classifier's kernel is initialised as torch's linear layer, not from N(0, 0.01).
- The reported error is that of the last checkpoint, not a median.
- Batches span epochs; no batch is shorter.
- The paper does not state the resizing filter; evaluation here is bilinear.
- A crop's log aspect ratio is uniform (see fb2016, whose crops the paper uses).
"""

from resnet_jax.config import default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.model.zero_init_last = True
    # 256 GPUs with 32 images each: batch statistics were taken per GPU.
    config.model.batch_norm_groups = 256
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.eval_shorter_side = 256
    config.data.normalization = "imagenet"
    config.augmentation.crop_area = (0.08, 1.0)
    config.augmentation.crop_aspect = (3 / 4, 4 / 3)
    config.augmentation.flip = True
    config.optimizer.learning_rate = 3.2
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.weight_decay_scope = "all_but_norm"
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (30, 60, 80)
    config.schedule.factor = 0.1
    config.schedule.warmup_epochs = 5
    config.schedule.warmup_initial_learning_rate = 0.1
    config.training.epochs = 90
    config.training.global_batch_size = 8_192
    return config
