"""Evaluation of trained nets: one, several, or all of them as an ensemble."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from resnet_jax import distributed, parallel
from resnet_jax.config import flatten
from resnet_jax.config.schema import fields
from resnet_jax.console import make_console, say
from resnet_jax.data import images
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError
from resnet_jax.evaluation import outputs
from resnet_jax.evaluation.evaluator import describe_error, evaluation_batch_size
from resnet_jax.evaluation.figures import Records, Spread, difference, figures
from resnet_jax.evaluation.inputs import Inputs, open_inputs
from resnet_jax.evaluation.labels import (
    Matched,
    match_classes,
    read_class_map,
    read_label_sets,
    validation_number,
)
from resnet_jax.evaluation.nets import TrainedNet, is_workdir, load_net
from resnet_jax.evaluation.outputs import Member, Output
from resnet_jax.evaluation.precise_statistics import precise_variables
from resnet_jax.evaluation.protocols import Average, Protocol, as_protocol
from resnet_jax.storage import expand, writing
from resnet_jax.workdir import Workdir

Tested = str | os.PathLike[str] | TrainedNet
"""A net to test: a workdir, a file, a hub name, or a net that is loaded already."""


def evaluate(net: Tested, **options: Any) -> dict[str, Any]:
    """Evaluates one net on a whole split, every example once.

    Args:
      net: the workdir of a run, a weights file, a hub name or a loaded net.
      **options: see ``evaluate_nets``.

    Returns:
      loss, error (a share of 1), errors and count; top5_error with 100 classes or more;
      calibration, errors by class, the confusion matrix and the worst mistakes; the
      net, its checksum and its protocol; and the step of a run's checkpoint. See
      ``figures.figures``.

    Raises:
      UserError: see ``evaluate_nets``; or the workdir holds runs of several seeds.
    """
    found = evaluate_nets([net], **options)["nets"]
    if len(found) > 1:
        raise UserError(
            f"workdir {net} holds runs of {len(found)} seeds; use evaluate_nets, or "
            f"give one of them, such as {found[0]['source']}"
        )
    return found[0]


def evaluate_nets(
    nets: Sequence[Tested | tuple[Tested, str | Protocol | None]],
    *,
    protocol: str | Protocol | None = None,
    ensemble: Average | None = None,
    data: str | None = None,
    split: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    class_map: str | os.PathLike[str] | None = None,
    all_classes: bool = False,
    model: str | None = None,
    checkpoint: int | str = "last",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int | None = None,
    precise_batches: int | None = None,
    overrides: Mapping[str, str] | None = None,
    on_mistake: Callable[[int, np.ndarray], object] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Tests nets on the same images; each image is decoded once.

    Args:
      nets: workdirs, weights files, hub names or loaded nets, each alone or with its
        protocol. The workdir of several seeds counts as its runs.
      protocol: how images are seen, such as "ten_crop" or "multi_scale:flip=false"; see
        ``protocols.parse``. None means each net's own single view.
      ensemble: also test the mean of all nets' "probabilities" or "logits".
      data: a folder or the name of a tfds data set; by default the first run's.
      split: "test", "holdout" or "train" of a run; or a split of ``data``.
      labels: a JSON list of lists of class numbers: several right answers for each
        ImageNet validation image, or none (ReaL). The nets choose among all classes.
      class_map: a file with the net's class for each class of the data, where names do
        not match.
      all_classes: if the data have only some classes, let the nets choose among all.
      model: name in the catalog, for files that do not contain it.
      checkpoint: of runs: "last", "best" (lowest held-out error) or a step.
      mean: of the pixels, for files that do not contain it; see ``load_net``.
      std: standard deviation of the same.
      batch_size: views per batch; does not affect results.
      precise_batches: first recompute the batch statistics of each run over this many
        of its first batches; None keeps the checkpoint's.
      overrides: values as text for the config's data section, such as
        ``{"data.path": "/data/moved"}``: where a run's data are now.
      on_mistake: receives the index and the uint8 image (h, w, c) of each example in
        the result's "mistakes".
      console: where to print; standard output by default.

    Returns:
      "nets", a dictionary for each (see ``evaluate``); "ensemble" if asked for;
      "spread" for runs that differ in their seed alone; "difference" for two other
      nets; and data, versions, hardware and command.

    Raises:
      UserError: a net, its data or a protocol does not exist or fit.
    """
    for name, value in (
        ("batch size", batch_size),
        ("number of precise batches", precise_batches),
    ):
        if value is not None and value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    if isinstance(nets, (str, os.PathLike, TrainedNet)) or not nets:
        raise UserError("give a list of nets, with at least one")
    console = console or make_console()
    load = functools.partial(
        load_net,
        model=model,
        checkpoint=checkpoint,
        mean=mean,
        std=std,
        overrides=overrides if data is None else None,
    )
    chosen: list[tuple[TrainedNet, Protocol]] = []
    for source, own in _runs(nets):
        net = source if isinstance(source, TrainedNet) else load(source)
        if precise_batches is not None and net is not source:
            net = _with_precise_statistics(net, precise_batches, console)
        views = as_protocol(own or protocol or net.protocol, net.sized_view)
        chosen.append((net, views))
    first = chosen[0][0]
    inputs = open_inputs(first, data, split, overrides)
    matched = match_classes(
        [net for net, _ in chosen],
        inputs.class_names,
        None if class_map is None else read_class_map(expand(class_map)),
        all_classes or labels is not None,
    )
    if matched.note:
        say(console, matched.note)
    members = [
        Member(net, views, columns)
        for (net, views), columns in zip(chosen, matched.columns, strict=True)
    ]
    label_sets = None
    if labels is not None:
        label_sets = read_label_sets(expand(labels), first.num_classes)
    test = _Test(members, ensemble, inputs, matched, label_sets)
    records, faults = _records(test, batch_size or _batch_size(first))
    for fault in faults:
        say(console, f"skipped: {fault}")
    result = _result(test, records, faults)
    _read_mistakes(test, result, on_mistake)
    _print_result(test, result, console)
    return result


def write_result(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes the result of ``evaluate_nets`` as JSON, complete or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class _Test:
    """What is tested.

    Attributes:
      members: the nets.
      ensemble: how their answers are averaged; None tests no ensemble.
      inputs: the images.
      matched: the classes of the images as classes of the nets.
      label_sets: the right classes of each validation image, in place of its label.
    """

    members: Sequence[Member]
    ensemble: Average | None
    inputs: Inputs
    matched: Matched
    label_sets: Sequence[tuple[int, ...]] | None

    def targets(self, output: Output) -> tuple[int, ...]:
        """The right classes of an image; none if it does not count."""
        if self.label_sets is None:
            return (int(self.matched.targets[output.label]),)
        number = validation_number(output.name)
        if number > len(self.label_sets):
            raise UserError(
                f"{output.name} is beyond the {len(self.label_sets)} items of the file "
                "of labels"
            )
        return self.label_sets[number - 1]


def _runs(
    nets: Sequence[Tested | tuple[Tested, str | Protocol | None]],
) -> Iterator[tuple[Tested, str | Protocol | None]]:
    """Nets with their protocols; each run of a workdir of several seeds."""
    for item in nets:
        source, own = item if isinstance(item, tuple) else (item, None)
        if not isinstance(source, TrainedNet) and is_workdir(source):
            folder = Workdir(source)
            config = folder.read_config()
            if config is not None and config.seeds > 1:
                for seed in range(config.seed, config.seed + config.seeds):
                    yield folder.path / f"seed-{seed}", own
                continue
        yield source, own


def _with_precise_statistics(
    net: TrainedNet, num_batches: int, console: rich.console.Console
) -> TrainedNet:
    """The net of a run with batch statistics of some of its first batches."""
    run = net.run
    if run is None:
        raise UserError(
            f"{net.source} is not a run, and has no batches: leave them out"
        )
    variables = precise_variables(
        run.model,
        run.config,
        run.mesh,
        run.variables,
        run.statistics,
        run.rng,
        run.feed(run.split("train")),
        num_batches,
    )
    say(console, f"batch statistics averaged over {num_batches} batches")
    return dataclasses.replace(net, variables=variables)


def _batch_size(net: TrainedNet) -> int:
    if net.run is None:
        return outputs.BATCH_SIZE
    return evaluation_batch_size(net.run.config, parallel.local_mesh())


def _records(test: _Test, batch_size: int) -> tuple[list[Records], list[str]]:
    """Records of each net and then the ensemble, and a sentence on each broken image.

    Each process tests its part of the examples.

    Raises:
      RuntimeError: an example was not counted exactly once, a bug here.
    """
    source, data = test.inputs.source, test.inputs.data
    total, faults, unlabelled = len(source), list[str](), 0
    num_records = len(test.members) + (test.ensemble is not None)
    records = [Records.empty(total) for _ in range(num_records)]
    for output in outputs.apply(
        test.members,
        source,
        data=data,
        batch_size=batch_size,
        indices=range(jax.process_index(), total, jax.process_count()),
        on_fault=faults.append if data.on_error == "skip" else None,
    ):
        targets = test.targets(output)
        if not targets:
            unlabelled += 1
            continue
        log_probs = list(output.log_probs)
        if test.ensemble:
            log_probs.append(outputs.average(output.log_probs, test.ensemble))
        for record, values in zip(records, log_probs, strict=True):
            record.set(output.index, values, targets)
    records = [_of_all_processes(record) for record in records]
    left_out = distributed.sum_over_processes(len(faults) + unlabelled)
    for record in records:
        if record.counted.max() > 1 or record.counted.sum() != total - left_out:
            raise RuntimeError(
                f"evaluation counted {record.counted.sum()} of {total - left_out} "
                "examples"
            )
    faults = sorted(distributed.gather(faults))
    if left_out == total:
        raise UserError("no image could be tested: all are broken or have no label")
    return records, faults


def _of_all_processes(records: Records) -> Records:
    """The records of all processes, each of which has a part of them."""
    if jax.process_count() == 1:
        return records
    gathered = multihost_utils.process_allgather(dataclasses.asdict(records))
    return Records(**{name: np.asarray(gathered[name]).sum(0) for name in gathered})


def _result(
    test: _Test, records: Sequence[Records], faults: Sequence[str]
) -> dict[str, Any]:
    """What ``evaluate_nets`` returns."""
    names, one_label = test.matched.class_names, test.label_sets is None
    found = [figures(record, names, one_label=one_label) for record in records]
    nets = []
    for member, values in zip(test.members, found, strict=False):
        net = member.net
        about = {
            "source": net.source,
            "model": net.name,
            "checksum": net.checksum,
            "protocol": member.protocol.to_json(),
        }
        step = {"step": net.run.step} if net.run else {}
        nets.append({**about, **step, **values})
    result: dict[str, Any] = {"nets": nets}
    if test.ensemble:
        result["ensemble"] = {"average": test.ensemble, **found[-1]}
    if len(nets) > 1 and _differ_in_seed(test.members):
        spread = Spread.of(net["error"] for net in nets)
        result["spread"] = dataclasses.asdict(spread)
    elif len(nets) == 2:
        result["difference"] = difference(records[0], records[1])
    return result | {
        "split": test.inputs.split,
        "data": dataclasses.asdict(test.inputs.identity),
        "answers": len(names),
        "skipped": list(faults),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read_mistakes(
    test: _Test,
    result: Mapping[str, Any],
    on_mistake: Callable[[int, np.ndarray], object] | None,
) -> None:
    """Adds the file names of the mistakes, and passes on their images."""
    tested = [*result["nets"], *filter(None, [result.get("ensemble")])]
    mistakes = [mistake for found in tested for mistake in found.get("mistakes", ())]
    channels, limit = test.members[0].net.channels, test.inputs.data.max_image_pixels
    for index in sorted({mistake["index"] for mistake in mistakes}):
        example = test.inputs.source[index]
        for mistake in mistakes:
            if mistake["index"] == index:
                mistake["name"] = example.name
        if on_mistake is not None:
            on_mistake(index, images.decode(example, channels, limit))


def _print_result(
    test: _Test, result: Mapping[str, Any], console: rich.console.Console
) -> None:
    split, count = result["split"], len(test.members)
    for member, found in zip(test.members, result["nets"], strict=True):
        if count > 1:
            say(console, f"{found['source']}: {found['model']}")
        _print_figures(found, split, console, member.protocol)
    if "ensemble" in result:
        say(console, f"ensemble of {count} nets, mean of {test.ensemble}")
        _print_figures(result["ensemble"], split, console)
    if "spread" in result:
        say(console, f"{split} error {Spread(**result['spread']).percent()}")
    if "difference" in result:
        say(console, _describe_difference(result["difference"]))


def _print_figures(
    found: Mapping[str, Any],
    split: str,
    console: rich.console.Console,
    protocol: Protocol | None = None,
) -> None:
    """Prints the main figures of a net, or of an ensemble, which has no protocol."""
    parts = []
    if "step" in found:
        parts.append(f"checkpoint at step {found['step']}")
    if "loss" in found:
        parts.append(f"loss {found['loss']:.4f}")
    if parts:
        say(console, ", ".join(parts))
    if protocol is not None:
        note = " (test-time augmentation)" if protocol.num_views > 1 else ""
        say(console, f"protocol {protocol.describe()}{note}")
    if "calibration" in found:
        ece = 100 * found["calibration"]["error"]
        say(console, f"{split} calibration error {ece:.2f} %")
    if "top5_error" in found:
        say(console, f"{split} top-5 error {100 * found['top5_error']:.2f} %")
    say(console, describe_error(split, found["errors"], found["count"]))


def _describe_difference(found: Mapping[str, Any]) -> str:
    bounds = f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
    return (
        f"difference of the errors {100 * found['difference']:+.2f} points (95 % "
        f"interval {bounds}, paired bootstrap; only the first is wrong on "
        f"{found['only_first_wrong']}, only the second on {found['only_second_wrong']})"
    )


def _differ_in_seed(members: Sequence[Member]) -> bool:
    """Whether all nets are runs of one config, tested alike, with different seeds."""
    if len({member.protocol for member in members}) > 1:
        return False
    lasting = [name for name, field in fields().items() if not field.operational]
    others = [name for name in lasting if name not in ("seed", "seeds")]
    configs, seeds = set(), set()
    for member in members:
        if member.net.run is None:
            return False
        values = flatten(member.net.run.config)
        seeds.add(values["seed"])
        configs.add(tuple(values[name] for name in others))
    return len(configs) == 1 and len(seeds) == len(members)
