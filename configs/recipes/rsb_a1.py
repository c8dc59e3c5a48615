r"""Procedure A1 of "ResNet strikes back" (Wightman et al. 2021): 600 epochs.

resnet-jax train --config recipes/rsb_a1:resnet50 --workdir runs/rsb_a1 \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is the net: resnet50 (default), or another of the catalog.

Source: https://arxiv.org/abs/2110.00476 (its table of the procedures). The
first and lowest learning rate, gradient limit, beta2 and epsilon are the defaults at
that time of train.py and optim/lamb.py in
https://github.com/huggingface/pytorch-image-models.
mmpretrain's configs of the procedure agree.

Expected from the source, top-1 error of resnet50 at 224: 19.6 %. Measured here: not
measured.

Differences from the original:
- The learning rate changes with every step; the original's with every epoch. Its
  cosine includes the warm-up, and it may continue at the lowest rate for a while.
- Both classes of a mixed image are targets if their weights exceed 0.2, A2's threshold,
  and label smoothing follows. timm's script smooths first, which its threshold undoes.
- Stochastic depth's rate starts at 0.05 / 16 in the first block, the original's at 0.
- Copies of an image are neighbours in a batch; the original's are on different GPUs.
- Batch statistics cover the whole batch; the original's each GPU.
- Crops are resized by this project's filter; the original's by bilinear and bicubic.
- Batches span epochs; no batch is shorter.
"""

from resnet_jax.config import default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config()
    config.model.name = net
    config.model.zero_init_last = True
    config.model.stochastic_depth_rate = 0.05
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    # 224 / 0.95, rounded down as timm does.
    config.data.eval_shorter_side = 235
    config.data.eval_interpolation = "bicubic"
    config.data.normalization = "imagenet"
    config.augmentation.crop_area = (0.08, 1.0)
    config.augmentation.crop_aspect = (3 / 4, 4 / 3)
    config.augmentation.flip = True
    config.augmentation.policy = "randaugment"
    config.augmentation.policy_operations = 2
    config.augmentation.policy_magnitude = 7.0
    config.augmentation.policy_magnitude_std = 0.5
    config.augmentation.repeats = 3
    config.augmentation.mixup_alpha = 0.2
    config.augmentation.cutmix_alpha = 1.0
    config.loss.kind = "sigmoid"
    config.loss.target_threshold = 0.2
    config.loss.label_smoothing = 0.1
    config.optimizer.kind = "lamb"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.momentum = 0.9
    config.optimizer.second_momentum = 0.999
    config.optimizer.epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    config.optimizer.weight_decay_scope = "kernels"
    config.optimizer.max_grad_norm = 1.0
    config.schedule.kind = "cosine"
    config.schedule.final_learning_rate = 1e-6
    config.schedule.warmup_epochs = 5
    config.schedule.warmup_initial_learning_rate = 1e-4
    config.training.epochs = 600
    config.training.global_batch_size = 2_048
    return config
