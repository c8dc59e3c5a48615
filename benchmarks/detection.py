"""Faster R-CNN trained from scratch on blood cells: precision and images per second.

    python -m benchmarks.detection --data BCCD --out FOLDER --minutes 8
    python -m benchmarks.detection --data BCCD --out FOLDER --tiny    # a CPU trial

The full size is ResNet-50 on the map C4 at 480 x 640, 128 regions of 14 x 14, bfloat16,
batch 8, for one GPU. Then plain-34 and ResNet-34, alike but for the shortcuts: the
claim of Table 7, better features alone, in small. Each run gets a share of the time;
its number of steps follows from the speed of a short run before. FOLDER/detection.json
is written after each.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

NETS = {"resnet50": 0.6, "resnet34": 0.2, "plain34": 0.2}
"""The nets, and their shares of the time."""
_TRIAL = 30  # steps
_LEAST = 40


def overrides(net: str, steps: int, options: argparse.Namespace) -> dict[str, str]:
    """The fields of configs/detection/bccd.py that a run changes."""
    changed = {
        "data.path": options.data,
        "model.name": net,
        "training.epochs": "None",
        "training.steps": str(steps),
        "schedule.warmup_epochs": "None",
        "schedule.warmup_steps": str(max(1, steps // 10)),
        "tracking.trackers": "()",
    }
    if options.tiny:
        return changed | {"detector.test_proposals": "20"}
    return changed | {
        "model.width": "None",
        "model.dtype": "bfloat16",
        "data.shorter_side": "480",
        "data.longer_side": "640",
        "detector.anchor_sizes": "32,64,128,256",
        "detector.rpn_features": "512",
        "detector.smallest_proposal": "8",
        "detector.train_candidates": "6000",
        "detector.train_proposals": "1000",
        "detector.test_candidates": "3000",
        "detector.test_proposals": "300",
        "detector.roi_samples": "128",
        "detector.roi_size": "14",
        "training.global_batch_size": "8",
    }


def run(net: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a net for about ``seconds`` and returns its figures."""
    from resnet_jax.config import DetectionConfig, load_config
    from resnet_jax.detection.train import train_detector

    def trained(name: str, steps: int) -> dict[str, Any]:
        changed = overrides(net, steps, options)
        config = load_config("detection/bccd", changed, DetectionConfig)
        return train_detector(config, Path(options.out) / name)

    began = time.perf_counter()
    # Two steps compile, and the others are timed; the cache serves the long run.
    trial = trained(f"{net}-trial", 3 if options.tiny else _TRIAL)
    left = seconds - (time.perf_counter() - began)
    speed = trial["images_per_second"] or 1.0
    steps = int(0.8 * left * speed / trial["global_batch_size"])
    result = trained(net, max(4 if options.tiny else _LEAST, steps))
    kept = ("step", "epoch", "parameters", "images_per_second", "seconds", "voc")
    return {
        **{name: result[name] for name in (*kept, "protocol", "global_batch_size")},
        "classes": {
            name: found["ap_area"] for name, found in result["classes"].items()
        },
        "config": overrides(net, result["step"], options),
    }


def main(arguments: Sequence[str]) -> None:
    """Runs the nets in turn."""
    options = _parse(arguments)
    content = {**record.circumstances("detection", arguments), "runs": {}}
    file = str(Path(options.out) / "detection.json")
    for net, share in NETS.items():
        found = run(net, 60 * share * options.minutes, options)
        content["runs"][net] = found
        record.write(file, content)
    print(f"{'net':10} {'steps':>7} {'epochs':>7} {'images/s':>9} {'mAP50':>7}")
    for net, found in content["runs"].items():
        precision = 100 * (found["voc"]["map_area"] or 0)
        speed = found["images_per_second"] or 0
        print(
            f"{net:10} {found['step']:7} {found['epoch']:7.1f} {speed:9.1f} "
            f"{precision:7.2f}"
        )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="BCCD in VOC layout")
    parser.add_argument("--out", required=True, help="a folder for runs and result")
    parser.add_argument("--minutes", type=record.positive, default=8)
    parser.add_argument("--tiny", action="store_true", help="a few small steps")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
