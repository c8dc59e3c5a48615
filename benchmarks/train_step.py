"""Our training step beside Flax's example's and torch's, in one process.

    python -m benchmarks.train_step --model cifar_resnet20 --json FILE
    python -m benchmarks.train_step --model resnet50 --json FILE

All do the same work on one fixed batch that lies in memory: uint8 images are normalised
inside the step, forward and backward pass in float32, SGD with momentum 0.9 and weight
decay 1e-4 on every parameter, running statistics of batch normalisation; no random
augmentation. Ours counts the batch's errors besides, which the others do not.

  resnet_jax           resnet_jax.training.step.make_train_step
  flax_example         the net of Flax's ImageNet example, optax.sgd, jitted, donated
  torch                eager, images as (n, c, h, w)
  torch_channels_last  the same in the memory format torch calls channels_last

The contenders take turns (A B C D A B C D ...), so that whatever else the machine does
falls on all of them alike. A turn is one untimed step, which lets the thread pool of
the contender before fall asleep, and then the timed ones, waited for at their end.
Parameters and multiply-adds show how far the work is the same: see benchmarks/peers.py
for the shortcuts of cifar_resnet20.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers, record
from benchmarks.contest import BATCH_SIZES, OURS, Contender, add_options, hold
from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.config import Config
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.models import create_model
from resnet_jax.training.benchmark import synthetic_step

_RECIPE = Config().optimizer
"""Learning rate 0.1, momentum 0.9, weight decay 1e-4."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What every contender is given: the net's name and one batch on the host.

    Attributes:
      model: a key of ``peers.LAYOUTS``.
      images: (n, h, w, 3) uint8.
      labels: (n,) int32.
      pixels: mean and deviation to normalise by.
    """

    model: str
    images: np.ndarray
    labels: np.ndarray
    pixels: PixelStatistics


def our_contender(
    model: str,
    batch_size: int,
    name: str = OURS,
    dtype: str = "float32",
    **options: Any,
) -> tuple[Contender, Work]:
    """The library's step, and the batch it was made with for the others.

    Args:
      model: a key of ``peers.LAYOUTS``.
      batch_size: images.
      name: in the table.
      dtype: of the convolutions.
      **options: further ones of ``create_model``.
    """
    side = peers.LAYOUTS[model].image_size
    train_step, state, batch = synthetic_step(
        model, batch_size, side, dtype, AugmentationConfig(), **options
    )
    net = create_model(model, **options)
    work = Work(
        model,
        np.asarray(batch["image"]),
        np.asarray(batch["label"]),
        jax.device_get(state.statistics),
    )
    parameters = count_parameters(state.params)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = train_step(state, None, batch)
        jax.block_until_ready(state)

    contender = Contender(
        name,
        parameters,
        count_multiply_adds(net, (side, side, 3)),
        run,
        is_finite=lambda: int(state.first_bad_step) < 0,
    )
    return contender, work


def flax_contender(work: Work, dtype: str = "float32") -> Contender:
    """Flax's example's net in a plain jitted step."""
    net = peers.FlaxResNet(peers.LAYOUTS[work.model], dtype=jnp.dtype(dtype))
    optimizer = optax.chain(
        optax.add_decayed_weights(_RECIPE.weight_decay),
        optax.sgd(_RECIPE.learning_rate, momentum=_RECIPE.momentum),
    )
    shape = work.images.shape[1:]

    @jax.jit
    def init(key):
        variables = net.init(key, np.zeros((1, *shape), np.float32))
        params = variables["params"]
        return params, variables["batch_stats"], optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels):
        params, batch_stats, opt_state = state
        images = normalize(to_unit(images), work.pixels)

        def loss_fn(params):
            logits, updates = net.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, statistics_), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), statistics_, opt_state), loss

    state = init(jax.random.key(0))
    images, labels = jax.device_put((work.images, work.labels))
    loss = np.float32(0)
    parameters = count_parameters(state[0])

    def run(steps: int) -> None:
        nonlocal state, loss
        for _ in range(steps):
            state, loss = train_step(state, images, labels)
        jax.block_until_ready((state, loss))

    multiply_adds = count_multiply_adds(net, shape)
    return Contender(
        "flax_example",
        parameters,
        multiply_adds,
        run,
        is_finite=lambda: bool(np.isfinite(loss)),
    )


def torch_contender(work: Work, channels_last: bool) -> Contender:
    """The same net in torch, eager."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers_torch import TorchResNet

    torch.manual_seed(0)
    layout_in_memory = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(array: Any) -> torch.Tensor:
        """(..., h, w, c) as (..., c, h, w)."""
        return torch.from_numpy(np.moveaxis(np.asarray(array), -1, -3).copy())

    net = TorchResNet(peers.LAYOUTS[work.model])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, *work.images.shape[1:3]))
    net.train()
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout_in_memory)
    images = tensor(work.images).contiguous(memory_format=layout_in_memory)
    labels = torch.from_numpy(work.labels.astype(np.int64))
    mean, std = tensor(work.pixels.mean), tensor(work.pixels.std)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=_RECIPE.learning_rate,
        momentum=_RECIPE.momentum,
        weight_decay=_RECIPE.weight_decay,
    )
    loss = torch.zeros(())

    def run(steps: int) -> None:
        nonlocal loss
        for _ in range(steps):
            optimizer.zero_grad()
            logits = net((images.float() / 255 - mean) / std)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()

    return Contender(
        "torch_channels_last" if channels_last else "torch",
        sum(parameter.numel() for parameter in net.parameters()),
        counter.get_total_flops() // 2,
        run,
        is_finite=lambda: bool(torch.isfinite(loss)),
    )


def make_contenders(model: str, batch_size: int) -> tuple[list[Contender], list[dict]]:
    """The contenders, ours first, and rows for those that cannot take part."""
    ours, work = our_contender(model, batch_size)
    contenders, absent = [ours, flax_contender(work)], []
    reason = None
    if importlib.util.find_spec("torch") is None:
        reason = "not installed"
    elif jax.default_backend() != "cpu":
        reason = f"not compared: JAX runs on {jax.default_backend()}"
    for name in ("torch", "torch_channels_last"):
        if reason is None:
            contenders.append(torch_contender(work, name == "torch_channels_last"))
        else:
            absent.append({"name": name, "status": reason})
    return contenders, absent


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    if jax.device_count() != 1:
        # The peers are written for one device.
        raise SystemExit(f"needs one device, not {jax.device_count()}")
    options.batch = options.batch or BATCH_SIZES[options.model]
    content = record.circumstances("train_step", arguments)
    contenders, absent = make_contenders(options.model, options.batch)
    hold(content, options, "training step", "float32", contenders, absent)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, model="cifar_resnet20", steps=10)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
