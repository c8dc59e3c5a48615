"""The schema of a detector's run: every field, its default and its meaning.

The defaults are the paper's (section 4.3 and its appendix). Where the paper is silent,
they come from py-faster-rcnn, the code that it used.
"""

import dataclasses

from resnet_jax.config.schema import (
    INTERPOLATIONS,
    MOST_BATCH,
    MOST_EPOCHS,
    MOST_PIXELS,
    MOST_STEPS,
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    ReadingConfig,
    ScheduleConfig,
    TrackingConfig,
)
from resnet_jax.environment import usable_cores
from resnet_jax.options import ModelOptions, option

FORMATS = ("voc", "coco", "prepared", "tfds")
PROCEDURES = ("joint", "four_steps", "rpn", "fast_rcnn")
METRICS = ("voc", "coco")
MOST_BOXES = 100_000


@dataclasses.dataclass(frozen=True)
class BackboneConfig(ModelOptions):
    """The net: the options of ``create_model``, and the weights to start from."""

    name: str = option("resnet50", "an ImageNet net or VGG of resnet_jax.list_models()")
    width: int | None = option(
        None,
        "channels of the first stage; None: the net's own",
        at_least=1,
        at_most=1024,
    )
    weights: str | None = option(
        None,
        "initial weights: of a classifier (file or hub name), or the workdir of "
        "another detector's run; None: random",
    )
    frozen: tuple[str, ...] | None = option(
        None,
        "parts not trained; None: with weights the stem and stage1 (VGG: stage1 and "
        "stage2), else none",
    )
    frozen_statistics: bool | None = option(
        None, "keep the batch statistics of the weights; None: if there are weights"
    )


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Region proposals, the head on each region, and the detections."""

    anchor_sizes: tuple[float, ...] = option(
        (128.0, 256.0, 512.0),
        "roots of the anchors' areas, pixels",
        at_least=1,
        at_most=MOST_PIXELS,
    )
    anchor_ratios: tuple[float, ...] = option(
        (0.5, 1.0, 2.0),
        "heights over widths of the anchors",
        at_least=0.01,
        at_most=100,
    )
    anchor_rounding: bool = option(
        False, "round the anchors' corners, as torchvision does"
    )
    anchor_order: str = option(
        "ratio",
        "order of a cell's anchors, as in the RPN's weights: ratio by ratio, as in "
        "torchvision, or size by size, as in Detectron2",
        choices=("ratio", "size"),
    )
    rpn_features: int = option(
        512, "channels of the RPN's 3x3 convolution", at_least=1, at_most=2**16
    )
    border_anchors: bool = option(
        False, "also train the RPN on anchors that cross the image's border"
    )
    rpn_high: float = option(
        0.7, "IoU from which an anchor is an object", at_least=0.01, at_most=1
    )
    rpn_low: float = option(
        0.3, "IoU below which an anchor is background", at_least=0, at_most=1
    )
    rpn_samples: int = option(
        256,
        "anchors an image in the RPN's loss; at most half are objects",
        at_least=2,
        at_most=2**16,
    )
    proposal_nms: float = option(
        0.7, "IoU above which a better proposal replaces another", at_least=0, at_most=1
    )
    smallest_proposal: float = option(
        16.0, "shortest side of a proposal, pixels", at_least=0, at_most=MOST_PIXELS
    )
    train_candidates: int = option(
        12_000, "best anchors before NMS, in training", at_least=1, at_most=MOST_BOXES
    )
    train_proposals: int = option(
        2000, "proposals after NMS, in training", at_least=1, at_most=MOST_BOXES
    )
    test_candidates: int = option(
        6000, "best anchors before NMS, in testing", at_least=1, at_most=MOST_BOXES
    )
    test_proposals: int = option(
        300, "proposals after NMS, in testing", at_least=1, at_most=MOST_BOXES
    )
    roi_samples: int = option(
        128, "regions an image in the head's loss", at_least=4, at_most=2**14
    )
    roi_high: float = option(
        0.5, "IoU from which a region is an object", at_least=0.01, at_most=1
    )
    roi_low: float = option(
        0.1,
        "IoU from which another region is background; with less it is not used",
        at_least=0,
        at_most=1,
    )
    roi_fraction: float = option(
        0.25, "largest share of objects among these regions", at_least=0, at_most=1
    )
    roi_pooling: str = option(
        "align",
        "how a region is cut from the map: align interpolates (He et al. 2017), "
        "align_v1 half a cell off, as torchvision's detectors do, max pools whole "
        "cells as in the paper",
        choices=("align", "align_v1", "max"),
    )
    roi_size: int | None = option(
        None,
        "side of a pooled region; None: the net's own, 14 (VGG: 7)",
        at_least=2,
        at_most=64,
    )
    class_agnostic: bool = option(False, "one box for all classes, not one each")
    context: bool = option(
        False, "add the feature of the whole image to each region (appendix B)"
    )
    score_threshold: float = option(
        0.05, "smallest score of a detection", at_least=0, at_most=1
    )
    nms: float = option(
        0.3,
        "IoU above which a better detection of the same class replaces another",
        at_least=0,
        at_most=1,
    )
    detections: int = option(
        100, "most detections an image", at_least=1, at_most=10_000
    )
    test_refine: bool = option(
        False,
        "box refinement (appendix B): classify the regressed boxes too, and let boxes "
        "vote on the place of each detection",
    )
    test_vote: float = option(
        0.5,
        "IoU from which a box of the class votes; 1: none but the detection itself",
        at_least=0,
        at_most=1,
    )
    test_scales: tuple[int, ...] = option(
        (),
        "shorter sides at which regions are classified (appendix B: "
        "200,400,600,800,1000), data.shorter_side among them; (): that alone",
        at_least=16,
        at_most=MOST_PIXELS,
    )
    test_region_side: int = option(
        224,
        "with scales: a region is classified at the two where it is nearest to a "
        "square of this side in area, by the larger of their features",
        at_least=1,
        at_most=MOST_PIXELS,
    )


@dataclasses.dataclass(frozen=True)
class DetectionDataConfig(ReadingConfig):
    """The data set and its preparation."""

    path: str | None = option(
        None,
        "folder in VOC or COCO layout, or output of prepare; None: tfds",
        operational=True,
    )
    format: str | None = option(
        None, "of the data; None: by what the folder holds", choices=FORMATS
    )
    name: str = option("voc", "a tfds name; with a path, the name in reports")
    data_dir: str | None = option(
        None,
        "where tfds data sets are prepared; None: ~/tensorflow_datasets",
        operational=True,
    )
    train_split: str = option(
        "trainval", "split to train on; VOC: also 2007/trainval+2012/trainval"
    )
    test_split: str = option("test", "split for the reported precision")
    class_names: tuple[str, ...] = option(
        (), "names of the classes, in the order of their numbers; (): as in the data"
    )
    difficult: str = option(
        "skip",
        "whether VOC's difficult objects are trained on",
        choices=("use", "skip"),
    )
    shorter_side: int = option(
        600, "to which images are resized", at_least=16, at_most=MOST_PIXELS
    )
    longer_side: int = option(
        1000, "limit of the longer side after that", at_least=16, at_most=MOST_PIXELS
    )
    interpolation: str = option(
        "bilinear", "antialiased filter of that resize", choices=INTERPOLATIONS
    )
    num_threads: int | None = option(
        None,
        "threads per process that read and decode; None: a few more than cores",
        at_least=1,
        operational=True,
        at_most=1024,
    )

    partial_batch = "span"
    """Every epoch is whole batches; see ``detection.batches``."""

    @property
    def threads(self) -> int:
        """``num_threads``, or a number that suits this machine."""
        return self.num_threads or usable_cores() + 2


@dataclasses.dataclass(frozen=True)
class DetectionAugmentationConfig:
    """Random augmentation of the training images."""

    flip: bool = option(True, "mirror each image with probability one half")


@dataclasses.dataclass(frozen=True)
class DetectionTrainingConfig:
    """What is trained, and for how long."""

    procedure: str = option(
        "joint",
        "joint trains proposals and head at once; four_steps alternates as in the "
        "paper, in runs of rpn and fast_rcnn, each of which trains one of the two",
        choices=PROCEDURES,
    )
    proposals: str | None = option(
        None, "fast_rcnn: workdir of the run that proposes; None: model.weights does"
    )
    steps: int | None = option(None, "optimizer steps", at_least=1, at_most=MOST_STEPS)
    epochs: float | None = option(
        None, "passes over the training set", at_least=0, at_most=MOST_EPOCHS
    )
    global_batch_size: int = option(
        8, "images per step, in all", at_least=1, at_most=MOST_BATCH
    )
    log_every_steps: int | None = option(
        None,
        "steps per row of metrics.jsonl; None: 100, or a 20th of a shorter run",
        at_least=1,
        at_most=MOST_STEPS,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class DetectionEvaluationConfig:
    """Evaluation during training."""

    every_steps: int | None = option(
        None, "None: only after the last step", at_least=1, at_most=MOST_STEPS
    )
    batch_size: int | None = option(
        None,
        "images per batch; None: as many as in training",
        at_least=1,
        operational=True,
        at_most=MOST_BATCH,
    )
    metric: str = option(
        "voc",
        "voc: average precision at IoU 0.5, by area and 11 points; coco: the twelve "
        "figures, which need the extra detection",
        choices=METRICS,
    )


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """The valid configuration of a detector's run."""

    seed: int = option(
        0,
        "seed of initialisation, order, augmentation and samples",
        at_least=0,
        at_most=2**31 - 1,
    )
    seeds: int = option(
        1,
        "number of runs, with this seed and the next ones, each in a folder of the "
        "workdir; reports mean and standard deviation",
        at_least=1,
        operational=True,
        at_most=10_000,
    )
    compilation_cache: str | None = option(
        "cache",
        "folder of compiled programs, relative to the workdir, so restarts need not "
        "compile again; None: none",
        operational=True,
    )
    model: BackboneConfig = BackboneConfig()
    detector: DetectorConfig = DetectorConfig()
    data: DetectionDataConfig = DetectionDataConfig()
    augmentation: DetectionAugmentationConfig = DetectionAugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: DetectionTrainingConfig = DetectionTrainingConfig()
    evaluation: DetectionEvaluationConfig = DetectionEvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()
