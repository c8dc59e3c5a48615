r"""The recipe of torchvision's newer weights, IMAGENET1K_V2: 600 epochs at 176 pixels.

resnet-jax train --config recipes/torchvision_v2:resnet50 \
    --workdir runs/torchvision_v2 \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is the net: resnet50 (default), resnet101, resnet152, or another of the
catalog.

Source: https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives/
and https://github.com/pytorch/vision, references/classification (train.py,
transforms.py); its command is also quoted in
https://github.com/pytorch/vision/issues/3995

Expected from the source, top-1 error of one centre crop, of the averaged weights:
19.142 % (50 layers), 18.114 % (101), 17.716 % (152). Measured here: not measured.

Differences from the original:
- The learning rate changes with every step; the original's with every epoch.
- Averages are updated every 32 steps of the run; the original counts within each epoch,
  and follows the weights during the warm-up.
- Mixing pairs each image with its mirror position in the batch; the original with its
  predecessor.
- Copies of an image are neighbours in a batch; the original's are on different GPUs.
- Crops are resized by this project's filter.
- Batches span epochs; no batch is shorter.
"""

from resnet_jax.config import default_config

EPOCHS = 600
BATCH = 1_024
STEPS_BETWEEN_AVERAGES = 32


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    # Eight GPUs with 128 images each: batch statistics were taken per GPU.
    config.model.batch_norm_groups = 8
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 176
    config.data.eval_image_size = 224
    config.data.eval_shorter_side = 232
    config.data.eval_interpolation = "bilinear"
    config.data.normalization = "imagenet"
    config.augmentation.crop_area = (0.08, 1.0)
    config.augmentation.crop_aspect = (3 / 4, 4 / 3)
    config.augmentation.flip = True
    config.augmentation.policy = "trivialaugment"
    config.augmentation.repeats = 4
    config.augmentation.erasing_probability = 0.1
    config.augmentation.mixup_alpha = 0.2
    config.augmentation.cutmix_alpha = 1.0
    config.loss.kind = "softmax"
    config.loss.label_smoothing = 0.1
    config.optimizer.kind = "sgd"
    config.optimizer.learning_rate = 0.5
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 2e-5
    config.optimizer.weight_decay_scope = "all_but_norm"
    # train.py stretches 1 - 0.99998 by the images between two averages, over epochs.
    stretch = BATCH * STEPS_BETWEEN_AVERAGES / EPOCHS
    config.optimizer.ema_decay = 1 - (1 - 0.99998) * stretch
    config.optimizer.ema_every_steps = STEPS_BETWEEN_AVERAGES
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 5
    # A hundredth of the highest rate (lr_warmup_decay).
    config.schedule.warmup_initial_learning_rate = 0.005
    config.training.epochs = EPOCHS
    config.training.global_batch_size = BATCH
    return config
