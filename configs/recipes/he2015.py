r"""The ImageNet nets of He et al. 2015, section 4.1, with the paper's exact recipe.

resnet-jax train --config recipes/he2015:resnet50 --workdir runs/resnet50 \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is the net: resnet18, 34, 50 (default), 101, 152, plain18, plain34. The
path holds train/WNID/IMAGE and val/WNID/IMAGE. Without it, tfds's imagenet2012 as
ArrayRecord. --config.model.dtype=bfloat16 is the usual choice on accelerators.

The learning rate is divided by 10 when the error on a held-out part of the training set
plateaus; the validation set chooses nothing. To divide at fixed steps instead (the
authors' follow-up: epochs 30 and 60, here in batches of 256):

  --config.schedule.kind=piecewise --config.schedule.boundaries_steps=150000,300000 \
  --config.data.holdout_examples=0

Source: section 3.4 of https://arxiv.org/abs/1512.03385

Expected from the source, 10-crop top-1 error: 27.88 % (18 layers), 25.03 % (34, A),
22.85 % (50), 21.75 % (101), 21.43 % (152); plain: 27.94 % (18), 28.54 % (34). The
authors' released models, one centre crop: 24.7 % (50), 23.6 % (101), 23.0 % (152).
This command reports the centre crop. Measured here: not measured.

Differences from the original:
- The rate falls by a rule when the error of 25,000 held-out training images plateaus;
  the paper does not say how plateaus were detected.
- The mean image averages 20,000 centre crops, not all images.
- Weight decay applies to every parameter. The paper does not say; others report that
  the authors decay only convolution weights (fb.resnet.torch's README.md, Goyal et al.
  2017): --config.optimizer.weight_decay_scope=kernels.
- The rate multiplies the velocity, as in Torch; Caffe applies it before the momentum.
- Images are resized by this project's filter.
"""

from resnet_jax.config import default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    # Table 2 and Figure 4 compare the plain nets with shortcut A.
    if net in ("resnet18", "resnet34"):
        config.model.shortcut = "A"
    config.model.stride_version = "v1"
    # Eight GPUs with 32 images each: batch statistics were taken per GPU.
    config.model.batch_norm_groups = 8
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.holdout_examples = 25_000
    config.data.image_size = 224
    config.data.eval_shorter_side = 256
    config.data.normalization = "per_pixel_mean"
    # The mean image of this many centre crops is within noise of that of all.
    config.data.statistics_examples = 20_000
    config.augmentation.shorter_side = (256, 480)
    config.augmentation.flip = True
    config.augmentation.color_noise = 0.1
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 1e-4
    config.schedule.kind = "plateau"
    config.schedule.factor = 0.1
    config.training.steps = 600_000
    config.training.global_batch_size = 256
    config.evaluation.every_steps = 5_000
    config.checkpoint.every_steps = 5_000
    return config
