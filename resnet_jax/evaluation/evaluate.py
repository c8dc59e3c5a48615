"""Evaluation of trained nets: one, several, or all of them as an ensemble."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
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
from resnet_jax.evaluation.nets import TrainedNet, load_net
from resnet_jax.evaluation.outputs import Member
from resnet_jax.evaluation.precise_statistics import precise_variables
from resnet_jax.evaluation.protocols import Average, Protocol, parse
from resnet_jax.storage import expand, is_remote, replacing
from resnet_jax.workdir import Workdir

Tested = str | os.PathLike[str] | TrainedNet
"""A net to test: a workdir, a file, a hub name, or a net that is loaded already."""


def evaluate(net: Tested, **options: Any) -> dict[str, Any]:
    """Evaluates one net on a whole split, every example once.

    Args:
      net: the workdir of a run, a weights file, a hub name or a loaded net.
      **options: those of ``evaluate_nets``.

    Returns:
      loss, error, errors and count; top5_error with 100 classes or more; calibration,
      errors by class and the confusion matrix; the net, its checksum and its protocol;
      and the step of a run's checkpoint.

    Raises:
      UserError: as ``evaluate_nets``; or the workdir holds runs of several seeds.
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
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Tests nets on the same images, each of which is decoded once.

    Args:
      nets: workdirs, weights files, hub names or loaded nets, each alone or with its
        protocol. The workdir of several seeds counts as its runs.
      protocol: how images are seen, such as "ten_crop" or "multi_scale:flip=false"; see
        ``protocols.parse``. None is each net's own single view.
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
      batch_size: views per batch; changes no result.
      precise_batches: first recompute the batch statistics of each run over this many
        of its first batches; None keeps the checkpoint's.
      overrides: values as text for the config's data section, such as
        ``{"data.path": "/data/moved"}``: where a run's data are now.
      console: where to print; standard output by default.

    Returns:
      "nets", a dictionary for each (see ``evaluate``); "ensemble" if asked for;
      "spread" for runs that differ in their seed alone; "difference" for two other
      nets; and what was tested where: data, versions, hardware, command.

    Raises:
      UserError: a net, its data or a protocol does not exist or fit.
    """
    given = {"batch size": batch_size, "number of precise batches": precise_batches}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    if isinstance(nets, (str, os.PathLike, TrainedNet)) or not nets:
        raise UserError("give a list of nets, with at least one")
    console = console or make_console()
    options = {"model": model, "mean": mean, "std": std, "checkpoint": checkpoint}
    moved = overrides if data is None else None
    chosen = [
        (_loaded(source, options, moved, precise_batches, console), own or protocol)
        for item in nets
        for source, own in _expanded(item)
    ]
    inputs = open_inputs(chosen[0][0], data, split, overrides)
    matched = match_classes(
        [net for net, _ in chosen],
        inputs.class_names,
        None if class_map is None else read_class_map(expand(class_map)),
        all_classes or labels is not None,
    )
    if matched.note:
        say(console, matched.note)
    members = [
        Member(net, _protocol(own, net), columns)
        for (net, own), columns in zip(chosen, matched.columns, strict=True)
    ]
    sets = None if labels is None else _label_sets(labels, members[0].net)
    size = batch_size or _batch_size(members[0].net)
    records, faults = _test(members, inputs, matched, sets, ensemble, size, console)
    return _summary(members, inputs, matched, records, ensemble, faults, sets, console)


def write_result(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes the result of ``evaluate_nets`` as JSON, complete or not at all."""
    with replacing(expand(path)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def _expanded(
    item: Tested | tuple[Tested, str | Protocol | None],
) -> list[tuple[Tested, str | Protocol | None]]:
    """Nets with their protocols; the runs of a workdir of several seeds."""
    source, own = item if isinstance(item, tuple) else (item, None)
    if isinstance(source, TrainedNet):
        return [(source, own)]
    if is_remote(source) or expand(source).is_dir():
        folder = Workdir(source)
        config = folder.read_config()
        if config is not None and config.seeds > 1:
            seeds = range(config.seed, config.seed + config.seeds)
            return [(folder.path / f"seed-{seed}", own) for seed in seeds]
    return [(source, own)]


def _loaded(
    source: Tested,
    options: Mapping[str, Any],
    overrides: Mapping[str, str] | None,
    precise_batches: int | None,
    console: rich.console.Console,
) -> TrainedNet:
    if isinstance(source, TrainedNet):
        return source
    net = load_net(source, **options, overrides=overrides)
    run = net.run
    if precise_batches is None:
        return net
    if run is None:
        raise UserError(f"{source} is not a run, and has no batches: leave them out")
    variables = precise_variables(
        run.model,
        run.config,
        run.mesh,
        run.variables,
        run.statistics,
        run.rng,
        run.feed(run.split("train")),
        precise_batches,
    )
    say(console, f"batch statistics averaged over {precise_batches} batches")
    return dataclasses.replace(net, variables=variables)


def _protocol(own: str | Protocol | None, net: TrainedNet) -> Protocol:
    if own is None:
        return net.protocol
    return parse(own, net.sized_view) if isinstance(own, str) else own


def _batch_size(net: TrainedNet) -> int:
    if net.run is None:
        return outputs.BATCH_SIZE
    return evaluation_batch_size(net.run.config, parallel.local_mesh())


def _label_sets(path: str | os.PathLike[str], net: TrainedNet) -> list[tuple[int, ...]]:
    return read_label_sets(expand(path), net.num_classes)


def _test(
    members: Sequence[Member],
    inputs: Inputs,
    matched: Matched,
    label_sets: list[tuple[int, ...]] | None,
    ensemble: Average | None,
    batch_size: int,
    console: rich.console.Console,
) -> tuple[list[Records], list[str]]:
    """Records of each net and of the ensemble, and a sentence for each broken image.

    Each process tests its part of the examples.

    Raises:
      RuntimeError: an example was not counted exactly once, a bug here.
    """
    total = len(inputs.source)
    faults: list[str] = []
    records = [Records.empty(total) for _ in range(len(members) + bool(ensemble))]
    mine = range(jax.process_index(), total, jax.process_count())
    skips = inputs.data.on_error == "skip"
    unlabelled = 0
    for output in outputs.apply(
        members,
        inputs.source,
        data=inputs.data,
        batch_size=batch_size,
        indices=mine,
        on_fault=faults.append if skips else None,
    ):
        targets: Sequence[int] = (int(matched.targets[output.label]),)
        if label_sets is not None:
            targets = _targets_in(label_sets, output.name)
        if not targets:
            unlabelled += 1
            continue
        log_probs = list(output.log_probs)
        if ensemble:
            log_probs.append(outputs.average(output.log_probs, ensemble))
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
    for fault in faults:
        say(console, f"skipped: {fault}")
    return records, faults


def _targets_in(label_sets: Sequence[tuple[int, ...]], name: str) -> tuple[int, ...]:
    number = validation_number(name)
    if number > len(label_sets):
        raise UserError(
            f"{name} is beyond the {len(label_sets)} items of the file of labels"
        )
    return label_sets[number - 1]


def _of_all_processes(records: Records) -> Records:
    """The records of all processes, each of which has a part of them."""
    if jax.process_count() == 1:
        return records
    arrays = dataclasses.asdict(records)
    return Records(
        **{
            name: np.asarray(multihost_utils.process_allgather(array)).sum(0)
            for name, array in arrays.items()
        }
    )


def _summary(
    members: Sequence[Member],
    inputs: Inputs,
    matched: Matched,
    records: Sequence[Records],
    ensemble: Average | None,
    faults: Sequence[str],
    label_sets: Any,
    console: rich.console.Console,
) -> dict[str, Any]:
    """What ``evaluate_nets`` returns; prints the main figures."""
    one_label = label_sets is None
    several = len(members) > 1
    nets = []
    for member, record in zip(members, records, strict=False):
        net = member.net
        found = {
            "source": net.source,
            "model": net.name,
            "checksum": net.checksum,
            "protocol": member.protocol.to_json(),
            **({"step": net.run.step} if net.run else {}),
            **figures(record, matched.class_names, one_label=one_label),
        }
        if several:
            say(console, f"{net.source}: {net.name}")
        _print(found, member, inputs.split, console)
        nets.append(found)
    result: dict[str, Any] = {"nets": nets}
    if ensemble:
        content = figures(records[-1], matched.class_names, one_label=one_label)
        result["ensemble"] = {"average": ensemble, **content}
        say(console, f"ensemble of {len(members)} nets, mean of {ensemble}")
        _print(content, None, inputs.split, console)
    if several and _differ_in_seed(members):
        spread = Spread.of(found["error"] for found in nets)
        result["spread"] = dataclasses.asdict(spread)
        say(console, f"{inputs.split} error {spread.percent()}")
    elif len(members) == 2:
        result["difference"] = found = dict(difference(records[0], records[1]))
        say(console, _describe_difference(found))
    return result | {
        "split": inputs.split,
        "data": dataclasses.asdict(inputs.identity),
        "answers": len(matched.class_names),
        "skipped": list(faults),
        "command": command_line(),
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _print(
    found: Mapping[str, Any],
    member: Member | None,
    split: str,
    console: rich.console.Console,
) -> None:
    parts = []
    if member is not None and member.net.run is not None:
        parts.append(f"checkpoint at step {member.net.run.step}")
    if "loss" in found:
        parts.append(f"loss {found['loss']:.4f}")
    if parts:
        say(console, ", ".join(parts))
    if member is not None:
        averaged = member.protocol.num_views > 1
        note = " (test-time augmentation)" if averaged else ""
        say(console, f"protocol {member.protocol.describe()}{note}")
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
    lasting = {name for name, field in fields().items() if not field.operational}
    configs, seeds = set(), set()
    for member in members:
        if member.net.run is None:
            return False
        values = flatten(member.net.run.config)
        seeds.add(values["seed"])
        others = lasting - {"seed", "seeds"}
        configs.add(tuple((name, values[name]) for name in sorted(others)))
    return len(configs) == 1 and len(seeds) == len(members)
