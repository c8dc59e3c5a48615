"""A trained detector, and what it finds in annotated images and in pictures."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import DetectionConfig, override
from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.data.batch import Batch
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.annotations import Source
from resnet_jax.detection.batches import evaluation_batches
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.faster_rcnn import FasterRCNN, detections_of, prepared
from resnet_jax.detection.state import make_detection_learner
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import Interrupted
from resnet_jax.evaluation.saved_run import find_step
from resnet_jax.identity import Identity
from resnet_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Detector:
    """A net with its variables.

    Attributes:
      config: of its run.
      model: the net.
      variables: params and batch_stats.
      statistics: of the pixels that it expects.
      class_names: in the order of its classes.
      mesh: the devices.
      step: of the checkpoint; 0 for a file of weights.
      trained_on: its run's data; None for a file of weights.
    """

    config: DetectionConfig
    model: FasterRCNN
    variables: Any
    statistics: PixelStatistics
    class_names: tuple[str, ...]
    mesh: Mesh
    step: int = 0
    trained_on: Identity | None = None


def load_detector(
    workdir: str | os.PathLike[str],
    checkpoint: int | str = "last",
    overrides: dict[str, str] | None = None,
) -> Detector:
    """Loads the detector of a run. The data need not be there.

    Args:
      workdir: of ``train_detector``.
      checkpoint: "last" or a step.
      overrides: values as text for fields of the config's data, detector and evaluation
        sections that do not change the net.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = Workdir(workdir, DetectionConfig)
    config = folder.read_config()
    if config is None:
        raise UserError(
            f"workdir {folder.path} holds no run (no config.json); train one with "
            "resnet-jax detect train"
        )
    held = folder.read_data()
    if config.seeds > 1 or held is None or not folder.checkpoints.is_dir():
        inside = sorted(path.parent.name for path in folder.path.glob("*/config.json"))
        hint = f"; it has the runs {', '.join(inside)}" if inside else ""
        raise UserError(f"workdir {folder.path} holds no checkpoint{hint}")
    config = override(config, overrides or {})
    mesh = parallel.data_mesh()
    learner = make_detection_learner(
        config, mesh, steps_per_epoch=1, num_classes=len(held.class_names)
    )
    abstract = learner.abstract_state()
    averaged = config.optimizer.ema_decay is not None
    names = ("ema",) if averaged else ("params", "batch_stats")
    same = parallel.replicated(mesh)
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same),
        {name: getattr(abstract, name) for name in (*names, "statistics")},
    )
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        step = find_step(checkpoints, checkpoint, folder)
        state, _ = checkpoints.restore(step, wanted)
    variables = state["ema"] if averaged else {name: state[name] for name in names}
    return Detector(
        config=config,
        model=learner.model,
        variables=variables,
        statistics=state["statistics"],
        class_names=held.class_names,
        mesh=mesh,
        step=step,
        trained_on=held,
    )


def protocol_of(config: DetectionConfig) -> dict[str, Any]:
    """How a detector is tested, for result files."""
    detector, data = config.detector, config.data
    return {
        "shorter_side": data.shorter_side,
        "longer_side": data.longer_side,
        "interpolation": data.interpolation,
        "proposals": detector.test_proposals,
        "score_threshold": detector.score_threshold,
        "nms": detector.nms,
        "detections": detector.detections,
    }


Program = Callable[[Any, PixelStatistics, jax.Array, jax.Array], Any]


def detection_program(model: FasterRCNN, mesh: Mesh) -> Program:
    """A jitted function of (variables, statistics, images, sizes) to ``Detected``.

    Each device looks at its own images; the detections are on all of them.
    """

    def run(variables: Any, statistics: Any, images: Any, sizes: Any) -> Any:
        return detections_of(model, variables, prepared(images, statistics), sizes)

    return jax.jit(
        parallel.on_each_device(run, mesh, shared=2),
        out_shardings=parallel.replicated(mesh),
    )


def detect_all(
    program: Program,
    variables: Any,
    statistics: PixelStatistics,
    source: Source,
    data: DetectionDataConfig,
    batch_size: int,
    mesh: Mesh,
    *,
    skipped: list[str] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Detections]:
    """The detections in every image of a source, in its order, on all processes.

    A broken image that ``data.on_error=skip`` leaves out has none.

    Raises:
      Interrupted: ``interrupted`` returned True; it is called after each batch.
      UserError: an image is broken and ``data.on_error`` is "stop".
    """
    found: dict[int, Detections] = {}
    batch_size = parallel.round_up(batch_size, mesh)
    # One batch waits on the devices while the host reads the next.
    waiting: list[tuple[Batch, Any]] = []
    gather = jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))

    def collect(batch: Batch, detected: Any) -> None:
        index, scales = jax.device_get(gather((batch["index"], batch["scales"])))
        for row, detections in enumerate(to_host(detected, scales)):
            if index[row] >= 0:
                found[int(index[row])] = detections

    for batch in evaluation_batches(
        source, data, batch_size, mesh=mesh, skipped=skipped
    ):
        detected = program(variables, statistics, batch["images"], batch["sizes"])
        waiting.append((batch, parallel.settled(detected)))
        if len(waiting) > 1:
            collect(*waiting.pop(0))
        if interrupted():
            raise Interrupted
    for pair in waiting:
        collect(*pair)
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    return [found.get(index, nothing) for index in range(len(source))]


def to_host(detected: Any, scales: np.ndarray) -> Iterator[Detections]:
    """The detections of a batch, in pixels of the original images.

    Args:
      detected: ``Detected`` (B, D, ...) in pixels of the resized images.
      scales: float32 (B, 2), resized over original height and width.
    """
    boxes, scores, classes, valid = map(np.asarray, jax.device_get(detected))
    for row, scale in enumerate(scales):
        there = valid[row]
        original = boxes[row][there] / np.tile(scale[::-1], 2)
        yield Detections(original, scores[row][there], classes[row][there])
