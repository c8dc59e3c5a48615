r"""Published or own weights, fine-tuned on your images: a folder of class folders.

resnet-jax train --config finetune:torchvision:resnet50 \
    --workdir runs/mine --config.data.path=/data/mine --config.data.name=mine

The argument names the weights, torchvision:NET[.WEIGHTS] or
hf-hub:OWNER/NET[@REVISION], or a net whose weights are in a file:

  resnet-jax train --config finetune:resnet18 ... \
      --config.model.weights=resnet18.safetensors

The path holds train/CLASS/IMAGE and test/CLASS/IMAGE, in any sizes; configs/folder.py
says how to split one folder. The classifier is new. The stem learns at 0.7 ** 5 = 0.17
of the classifier's rate, the stages in between (optimizer.layer_decay). With few images
per class, freeze parts of the net; with small batches, freeze all batch statistics:

  --config.model.frozen=stem,stage1,stage2 --config.model.frozen_statistics=true

Pixels are normalised as the weights expect (data.normalization). Weights trained on
images of another size need data.image_size and data.eval_shorter_side.

A generic recipe, not tuned on any data set. On a held-out part
(--config.data.holdout_examples), try learning rates from 0.003 to 0.1, and
optimizer.layer_decay=1. Measured here: not measured.
"""

from resnet_jax.config import default_config


def get_config(source="torchvision:resnet50"):
    """The config of a run; ``source`` names published weights, or a net."""
    hub, _, name = source.rpartition(":")
    config = default_config()
    # hf-hub:timm/resnet50.a1_in1k@main and torchvision:resnet50.IMAGENET1K_V2
    config.model.name = name.rpartition("/")[2].partition("@")[0].partition(".")[0]
    config.model.weights = source if hub else None
    config.model.new_head = True
    config.data.name = "folder"
    config.data.image_size = 224
    config.data.eval_shorter_side = 256
    config.data.normalization = "weights"
    config.augmentation.crop_area = (0.25, 1.0)
    config.augmentation.flip = True
    config.optimizer.learning_rate = 0.01
    config.optimizer.layer_decay = 0.7
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 1
    config.training.epochs = 20
    config.training.global_batch_size = 64
    return config
