"""A trained detector, and what it finds in annotated images and in pictures."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from resnet_jax.detection.batches import at_scale, evaluation_batches
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.faster_rcnn import FasterRCNN, make_detector
from resnet_jax.detection.inference import Scale, detections_of
from resnet_jax.detection.state import make_detection_learner
from resnet_jax.detection.weights import read_detector
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import Interrupted
from resnet_jax.evaluation.nets import is_workdir
from resnet_jax.evaluation.saved_run import find_step
from resnet_jax.identity import Identity
from resnet_jax.storage import expand
from resnet_jax.weights.hub import HUB_PREFIX, TORCHVISION_PREFIX
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

    @functools.cached_property
    def program(self) -> "Program":
        """Its ``detection_program``, kept so that it compiles once."""
        return detection_program([self.model], self.mesh, self.config.data)


def load_detector(
    source: str | os.PathLike[str], checkpoint: int | str = "last"
) -> Detector:
    """Loads the detector of a run, or of a file. The data need not be there.

    Args:
      source: the workdir of ``train_detector``; or a file that
        ``weights.read_detector`` reads, which names no classes.
      checkpoint: of the run: "last" or a step.

    Raises:
      UserError: there is no such run, checkpoint or file, or it is damaged.
    """
    return _of_run(source, checkpoint) if is_workdir(source) else _of_file(source)


def _of_file(source: str | os.PathLike[str]) -> Detector:
    is_name = os.fspath(source).startswith((HUB_PREFIX, TORCHVISION_PREFIX))
    if not is_name and not expand(source).exists():
        raise UserError(
            f"{source} does not exist: give the workdir of resnet-jax detect train, or "
            "a file with a detector's weights"
        )
    found = read_detector(source)
    return Detector(
        config=found.config,
        model=make_detector(found.config, found.num_classes),
        variables=found.variables,
        statistics=found.statistics,
        class_names=tuple(map(str, range(found.num_classes))),
        mesh=parallel.data_mesh(),
    )


def _of_run(workdir: str | os.PathLike[str], checkpoint: int | str) -> Detector:
    folder = Workdir(workdir, DetectionConfig)
    config, trained_on = folder.read_config(), folder.read_data()
    is_whole = config is not None and config.seeds == 1
    if is_whole and config.training.procedure == "four_steps":
        return _of_run(folder.path / LAST_STEP, checkpoint)
    if checkpoint == "best":
        raise UserError(
            "a detector's run keeps no best checkpoint: give last or a step"
        )
    if config is None:
        raise UserError(
            f"workdir {folder.path} holds no run (no config.json); train one with "
            "resnet-jax detect train"
        )
    if trained_on is None or not folder.checkpoints.is_dir():
        inside = sorted(path.parent.name for path in folder.path.glob("*/config.json"))
        hint = f"; it has the runs {', '.join(inside)}" if inside else ""
        raise UserError(f"workdir {folder.path} holds no checkpoint{hint}")
    mesh = parallel.data_mesh()
    learner = make_detection_learner(
        config, mesh, steps_per_epoch=1, num_classes=len(trained_on.class_names)
    )
    abstract, same = learner.abstract_state(), parallel.replicated(mesh)
    names = ("ema",) if abstract.ema is not None else ("params", "batch_stats")
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same),
        {name: getattr(abstract, name) for name in (*names, "statistics")},
    )
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        step = find_step(checkpoints, checkpoint, folder)
        state, _ = checkpoints.restore(step, wanted)
    return Detector(
        config=config,
        model=learner.model,
        variables=state.get("ema") or {name: state[name] for name in names},
        statistics=state["statistics"],
        class_names=trained_on.class_names,
        mesh=mesh,
        step=step,
        trained_on=trained_on,
    )


FREE_FIELDS: tuple[str, ...] = (
    *("data.", "evaluation.", "detector.test_", "detector.proposal_nms"),
    *("detector.smallest_proposal", "detector.score_threshold", "detector.nms"),
    "detector.detections",
)
"""The config fields, or beginnings of fields, that a test may change."""
_FREE = [f"{name}*" if name[-1] in "._" else name for name in FREE_FIELDS]

LAST_STEP = "shared_fast_rcnn"
"""The folder of the detector that training in four steps ends with."""

Given = Detector | str | os.PathLike[str]
"""A detector, or the workdir of its run."""


def open_members(
    detectors: Given | Sequence[Given],
    checkpoint: int | str = "last",
    overrides: Mapping[str, str] | None = None,
) -> tuple[Detector, ...]:
    """The detectors of an ensemble, or one alone, as they are tested.

    The first one's config, with the overrides, says how all of them are tested.

    Args:
      detectors: one, or several of the same classes.
      checkpoint: of each run: "last" or a step.
      overrides: values as text for config fields of ``FREE_FIELDS``.

    Raises:
      UserError: there is no such run, its classes differ, or a field cannot be changed.
    """
    for name in overrides or {}:
        if not name.startswith(FREE_FIELDS):
            raise UserError(
                f"{name} cannot be changed for a trained detector; only "
                f"{', '.join(_FREE)} can"
            )
    several = isinstance(detectors, Sequence) and not isinstance(detectors, str)
    given: Any = detectors if several else [detectors]
    loaded = [
        each if isinstance(each, Detector) else load_detector(each, checkpoint)
        for each in given
    ]
    for each in loaded:
        if each.config.training.procedure == "rpn":
            raise UserError(
                "a run with training.procedure=rpn only proposes regions, and its head "
                "is random: give the run of a whole detector"
            )
    if not loaded:
        raise UserError("give at least one detector")
    if len(loaded) == 1 and not overrides:
        return (loaded[0],)
    config = override(loaded[0].config, overrides or {})
    members = []
    for number, each in enumerate(loaded, start=1):
        if each.class_names != loaded[0].class_names:
            raise UserError(
                f"detector {number} finds {', '.join(each.class_names)}, but the first "
                f"finds {', '.join(loaded[0].class_names)}: an ensemble needs the same "
                "classes in the same order"
            )
        free = {
            field.name: getattr(config.detector, field.name)
            for field in dataclasses.fields(config.detector)
            if f"detector.{field.name}".startswith(FREE_FIELDS)
        }
        own = dataclasses.replace(each.config.detector, **free)
        tested = dataclasses.replace(config, model=each.config.model, detector=own)
        model = each.model.clone(config=own)
        members.append(dataclasses.replace(each, config=tested, model=model))
    return tuple(members)


def finder(members: Sequence[Detector]) -> Callable[..., list[Detections]]:
    """``detect_all`` of ``open_members``; give it ``source`` and ``batch_size``."""
    first = members[0]
    program = first.program
    if len(members) > 1:
        models = [each.model for each in members]
        program = detection_program(models, first.mesh, first.config.data)
    return functools.partial(
        detect_all,
        program,
        [each.variables for each in members],
        [each.statistics for each in members],
        data=first.config.data,
        mesh=first.mesh,
        scales=first.config.detector.test_scales,
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
        "refine": detector.test_refine,
        "vote": detector.test_vote if detector.test_refine else None,
        "scales": detector.test_scales or None,
        "region_side": detector.test_region_side if detector.test_scales else None,
    }


Program = Callable[[Sequence[Any], Sequence[PixelStatistics], Sequence[Scale]], Any]


def detection_program(
    models: Sequence[FasterRCNN], mesh: Mesh, data: DetectionDataConfig
) -> Program:
    """A jitted ``detections_of``: variables, statistics and scales to ``Detected``.

    Each device looks at its own images; the detections are on all of them.

    Args:
      models: one, or those of an ensemble.
      mesh: of the devices.
      data: how images are prepared.
    """
    scales = models[0].config.test_scales
    base = scales.index(data.shorter_side) if scales else 0

    def run(variables: Any, statistics: Any, scales: Any) -> Any:
        return detections_of(models, variables, statistics, scales, base)

    return jax.jit(
        parallel.on_each_device(run, mesh, shared=2),
        out_shardings=parallel.replicated(mesh),
    )


def detect_all(
    program: Program,
    variables: Sequence[Any],
    statistics: Sequence[PixelStatistics],
    source: Source,
    data: DetectionDataConfig,
    batch_size: int,
    mesh: Mesh,
    *,
    scales: Sequence[int] = (),
    skipped: list[str] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Detections]:
    """The detections in every image of a source, in its order, on all processes.

    A broken image that ``data.on_error=skip`` leaves out has none.

    Args:
      program: of ``detection_program``.
      variables: of each of its models.
      statistics: of the pixels that each expects.
      source: of the images.
      data: how they are prepared and read.
      batch_size: of the global batch, rounded up to divide over the devices.
      mesh: of the devices.
      scales: ``test_scales`` of the first model.
      skipped: gets a sentence for each broken image that was left out.
      interrupted: called after each batch.

    Raises:
      Interrupted: ``interrupted`` returned True.
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

    sides = scales or (data.shorter_side,)
    base = sides.index(data.shorter_side)
    streams = [
        evaluation_batches(
            source,
            at_scale(data, side),
            batch_size,
            mesh=mesh,
            skipped=skipped if index == base else None,
        )
        for index, side in enumerate(sides)
    ]
    for batches in zip(*streams, strict=True):
        pixels = tuple((batch["images"], batch["sizes"]) for batch in batches)
        detected = program(variables, statistics, pixels)
        waiting.append((batches[base], parallel.settled(detected)))
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
