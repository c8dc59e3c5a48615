r"""Faster R-CNN with ResNet-50 on COCO, on the map C4, by today's "1x" schedule.

resnet-jax detect train --config detection/coco_c4 --workdir runs/coco \
    --config.data.path=coco --config.model.weights=torchvision:resnet50

16 images per step, 90,000 steps. The paper trains ResNet-101 for 320,000 iterations
and reports 48.4 % AP at IoU 0.5 and 27.2 % over all (Table 8); re-implementations by
this schedule report 35.7 % over all. Not measured here.
"""

from resnet_jax.config import DetectionConfig, default_config


def get_config(net="resnet50"):
    """The config of a run; ``net`` is a name of resnet_jax.list_models()."""
    config = default_config(DetectionConfig)
    config.model.name = net
    config.model.dtype = "bfloat16"
    config.data.name = "COCO 2017"
    config.data.format = "coco"
    config.data.train_split = "train2017"
    config.data.test_split = "val2017"
    config.data.shorter_side = 800
    config.data.longer_side = 1333
    config.detector.anchor_sizes = (32.0, 64.0, 128.0, 256.0, 512.0)
    config.detector.border_anchors = True
    config.detector.smallest_proposal = 0.0
    config.detector.test_proposals = 1000
    config.detector.roi_samples = 512
    config.detector.roi_low = 0.0
    config.detector.nms = 0.5
    config.training.global_batch_size = 16
    config.training.steps = 90_000
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 1e-4
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_steps = (60_000, 80_000)
    config.schedule.warmup_steps = 1000
    config.evaluation.metric = "coco"
    config.checkpoint.every_steps = 1000
    return config
