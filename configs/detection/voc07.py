r"""Faster R-CNN with ResNet-101 on PASCAL VOC 2007, trained as in the paper.

resnet-jax detect train --config detection/voc07 --workdir runs/voc07 \
    --config.data.path=VOCdevkit/VOC2007 --config.model.weights=torchvision:resnet101

The argument is the number of images per step: learning rate and steps scale with it.
Expected from the paper (Table 7; trained on 2007 and 2012): 76.4 % mAP by 11 points
with ResNet-101, 73.2 % with VGG-16. Re-implementations trained on 2007 alone reach
about 75 %. Not measured here.
"""

from resnet_jax.config import DetectionConfig, default_config


def get_config(images="1"):
    """The config of a run; ``images`` is the number of images per step."""
    images = int(images)
    config = default_config(DetectionConfig)
    config.model.name = "resnet101"
    config.model.dtype = "bfloat16"
    config.data.name = "VOC 2007"
    config.data.format = "voc"
    config.data.train_split = "trainval"
    config.data.test_split = "test"
    config.training.global_batch_size = images
    config.training.steps = 80_000 // images
    config.optimizer.learning_rate = 1e-3 * images
    config.optimizer.weight_decay = 5e-4
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_steps = (60_000 // images,)
    config.checkpoint.every_steps = 1000
    return config
