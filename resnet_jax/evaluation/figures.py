"""What a test measured, from records of each example."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from resnet_jax.evaluation.metrics import TOP5_CLASSES

CALIBRATION_BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""

_SHOWN_CLASSES = 2000
"""Confusion matrices of more classes are left out: they grow with the square."""

MOST_MISTAKES = 24
"""Wrong answers that a result names, the most confident ones."""

RESAMPLES = 10_000
"""Of the bootstrap; its random numbers are always the same."""


@dataclasses.dataclass(frozen=True)
class Records:
    """What a net said about each example, arrays (n,).

    Attributes:
      counted: int32, how often the example was tested; 0 if its image is broken or it
        has no label.
      target: int32, the right class; with several, the likeliest of them.
      predicted: int32, the class with the largest probability.
      rank: int32, classes that are likelier than the target.
      loss: float32, negative log-likelihood of the target.
      confidence: float32, the largest probability.
    """

    counted: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray

    @classmethod
    def empty(cls, n: int) -> "Records":
        """Records of n examples, none of them counted."""
        whole = [np.zeros(n, np.int32) for _ in range(4)]
        return cls(*whole, *(np.zeros(n, np.float32) for _ in range(2)))

    def set(self, index: int, log_probs: np.ndarray, targets: Sequence[int]) -> None:
        """Records log-probabilities (k,) for an example with its right classes."""
        likeliest = max(targets, key=log_probs.__getitem__)
        own = log_probs[likeliest]
        self.counted[index] += 1
        self.target[index] = likeliest
        self.predicted[index] = predicted = np.argmax(log_probs)
        # Not ">": every class beats one whose probability is NaN.
        self.rank[index] = np.sum(~(log_probs <= own))
        self.loss[index] = -own
        self.confidence[index] = np.exp(log_probs[predicted])

    @property
    def wrong(self) -> np.ndarray:
        """Whether each example is an error, bool (n,)."""
        return self.predicted != self.target

    def only_counted(self) -> "Records":
        """The records of the examples that count."""
        some = self.counted > 0
        fields = (field.name for field in dataclasses.fields(self))
        return Records(*(getattr(self, name)[some] for name in fields))


def figures(
    records: Records, class_names: Sequence[str], *, one_label: bool = True
) -> dict[str, Any]:
    """Errors, loss, calibration, errors by class, confusions and the worst mistakes.

    Args:
      records: of all examples.
      class_names: of the answers.
      one_label: False leaves out what needs one right class for each example.

    Returns:
      error, errors, count; top5_error and top5_errors with 100 classes or more; and
      with one label loss, calibration, classes (those that occur), mistakes (see
      ``worst_mistakes``), and confusion with class_names. Errors are shares of 1, not
      percent.
    """
    some = records.only_counted()
    count, errors = len(some.target), int(some.wrong.sum())
    found: dict[str, Any] = {
        "error": errors / count,
        "errors": errors,
        "count": count,
    }
    if len(class_names) >= TOP5_CLASSES:
        top5 = int((some.rank >= 5).sum())
        found |= {"top5_error": top5 / count, "top5_errors": top5}
    if not one_label:
        return found
    found["loss"] = float(np.mean(some.loss, dtype=np.float64))
    found["calibration"] = calibration(some)
    found["classes"] = {
        name: {"errors": int(some.wrong[own].sum()), "count": int(own.sum())}
        for label, name in enumerate(class_names)
        if (own := some.target == label).any()
    }
    found["mistakes"] = worst_mistakes(records, class_names)
    if len(class_names) <= _SHOWN_CLASSES:
        found["class_names"] = list(class_names)
        found["confusion"] = _confusion(some)
    return found


def worst_mistakes(
    records: Records, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """The most confident wrong answers, at most ``MOST_MISTAKES``.

    Returns:
      index (of the example), class (the right one), predicted, and the probability of
      the predicted class, for each mistake; the most confident first.
    """
    wrong = np.flatnonzero((records.counted > 0) & records.wrong)
    confidences = np.nan_to_num(records.confidence[wrong])
    order = np.argsort(-confidences, kind="stable")[:MOST_MISTAKES]
    return [
        {
            "index": int(index),
            "class": class_names[records.target[index]],
            "predicted": class_names[records.predicted[index]],
            "probability": float(confidence),
        }
        for index, confidence in zip(wrong[order], confidences[order], strict=True)
    ]


def calibration(records: Records) -> dict[str, Any]:
    """The expected calibration error, and the bins of its diagram (Guo et al. 2017).

    ``error`` is the mean over examples of |accuracy - confidence| of their bin.
    """
    confidences = np.nan_to_num(records.confidence)
    place = np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1
    place = np.clip(place, 0, CALIBRATION_BINS - 1)
    bins, total = [], 0.0
    for index in range(CALIBRATION_BINS):
        own = place == index
        if not own.any():
            continue
        accuracy = float(np.mean(~records.wrong[own]))
        confidence = float(np.mean(confidences[own], dtype=np.float64))
        total += own.sum() * abs(accuracy - confidence)
        bins.append(
            {
                "from": index / CALIBRATION_BINS,
                "count": int(own.sum()),
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )
    return {"error": float(total / len(place)), "bins": bins}


def _confusion(records: Records) -> list[tuple[int, int, int]]:
    """(label, predicted, count) for all pairs that occur, the diagonal included."""
    pairs = np.stack([records.target, records.predicted], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    return [
        (int(label), int(predicted), int(count))
        for (label, predicted), count in zip(unique, counts, strict=True)
    ]


def difference(first: Records, second: Records) -> dict[str, Any]:
    """The difference of two errors on the same examples, by a paired bootstrap.

    Returns:
      difference (first minus second), the bounds of its 95 % interval, and the examples
      that only one of the two gets wrong.
    """
    some = first.counted > 0
    ours, others = first.wrong[some], second.wrong[some]
    n, worse = len(ours), int((ours & ~others).sum())
    better = int((others & ~ours).sum())
    # An example adds -1, 0 or 1, so only these counts matter in a resample.
    shares = np.array([worse, better, n - worse - better]) / n
    drawn = np.random.default_rng(0).multinomial(n, shares, RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / n
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "difference": (worse - better) / n,
        "low": float(low),
        "high": float(high),
        "only_first_wrong": worse,
        "only_second_wrong": better,
        "count": n,
    }


@dataclasses.dataclass(frozen=True)
class Spread:
    """A metric over several runs.

    Attributes:
      mean: of the runs.
      deviation: their sample standard deviation (n - 1); None for one run.
      count: n.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        numbers = list(values)
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), deviation, len(numbers))

    def __str__(self) -> str:
        """In percent: ``6.61 +- 0.16``."""
        text = f"{100 * self.mean:.2f}"
        return (
            text
            if self.deviation is None
            else f"{text} \u00b1 {100 * self.deviation:.2f}"
        )

    def percent(self) -> str:
        """As ``6.61 +- 0.16 % (5 seeds)``."""
        return f"{self} % ({self.count} seed{'s' if self.count > 1 else ''})"
