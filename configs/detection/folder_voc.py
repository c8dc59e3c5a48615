r"""Faster R-CNN with ResNet-50 fine-tuned on a folder in VOC layout.

resnet-jax detect train --config detection/folder_voc --workdir runs/mine \
    --config.data.path=mine --config.model.weights=torchvision:resnet50

The folder holds Annotations/NAME.xml, JPEGImages/NAME.jpg and
ImageSets/Main/{trainval,test}.txt; its classes are those that the files name. The
weights' stem, first stage and statistics stay frozen, as in the paper.
"""

from resnet_jax.config import DetectionConfig, default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config(DetectionConfig)
    config.model.name = net
    config.data.name = "VOC folder"
    config.data.format = "voc"
    config.detector.border_anchors = True
    config.detector.anchor_sizes = (32.0, 64.0, 128.0, 256.0, 512.0)
    config.training.global_batch_size = 8
    config.training.epochs = 20
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 1e-4
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 1
    return config
