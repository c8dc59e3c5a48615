"""Forward and backward pass of our nets beside Flax's example's and torch's.

    python -m benchmarks.forward_backward --model resnet50 --json FILE
    python -m benchmarks.forward_backward --model cifar_resnet20 --json FILE

All compute the mean cross-entropy of one fixed batch of float32 images that lie on the
device, its gradient by every parameter, and the new running statistics; there is no
optimizer. The whole training step is what benchmarks/train_step.py measures.

  resnet_jax           the net as ``create_model`` makes it (conv_algorithm "auto")
  resnet_jax_xla       the same with conv_algorithm "xla": every convolution is XLA's
  flax_example         the net of Flax's ImageNet example
  torch                eager, images as (n, c, h, w)
  torch_channels_last  the same in the memory format torch calls channels_last
  torch_compiled       channels_last through torch.compile (on a GPU, or --compile)

With --dtype bfloat16 convolutions run in it, in torch under autocast. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that JAX leaves torch its memory. The contenders
take turns as in train_step; ratios are medians of the rounds' ratios. Parameters and
multiply-adds show how far the work is the same: see benchmarks/peers.py.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import peers, record
from benchmarks.contest import BATCH_SIZES, OURS, Contender, add_options, hold
from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.evaluation.metrics import cross_entropy
from resnet_jax.models import create_model


def jax_contender(
    name: str, net: nn.Module, images: np.ndarray, labels: np.ndarray
) -> Contender:
    """A Linen net's loss and gradient, jitted."""
    shape = images.shape[1:]
    variables: Any = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    device_images, device_labels = jax.device_put((images, labels))

    @jax.jit
    def gradient(variables, images, labels):
        def loss_fn(params):
            logits, updates = net.apply(
                variables | {"params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return cross_entropy(logits, labels).mean(), updates

        return jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])

    loss = jnp.zeros(())

    def run(steps: int) -> None:
        nonlocal loss
        for _ in range(steps):
            (loss, updates), gradients = gradient(
                variables, device_images, device_labels
            )
        jax.block_until_ready((loss, updates, gradients))

    return Contender(
        name,
        count_parameters(variables["params"]),
        count_multiply_adds(net, shape),
        run,
        is_finite=lambda: bool(jnp.isfinite(loss)),
    )


def torch_contender(
    name: str, model: str, images: np.ndarray, labels: np.ndarray, dtype: str
) -> Contender:
    """The peer in torch, on the kind of device that JAX runs on."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.peers_torch import TorchResNet

    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    layout = torch.contiguous_format if name == "torch" else torch.channels_last
    net = TorchResNet(peers.LAYOUTS[model])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, *images.shape[1:3]))
    net.train().to(device)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device)
    batch = batch.contiguous(memory_format=layout)
    targets = torch.from_numpy(labels.astype(np.int64)).to(device)
    forward = torch.compile(net) if name == "torch_compiled" else net
    loss = torch.zeros(())

    def run(steps: int) -> None:
        nonlocal loss
        for _ in range(steps):
            for parameter in net.parameters():
                parameter.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = forward(batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return Contender(
        name,
        sum(parameter.numel() for parameter in net.parameters()),
        counter.get_total_flops() // 2,
        run,
        is_finite=lambda: bool(torch.isfinite(loss)),
    )


def make_contenders(
    model: str, batch_size: int, dtype: str, compiled: bool
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """The contenders, ours first, and rows for those that cannot take part."""
    layout = peers.LAYOUTS[model]
    rng = np.random.default_rng(0)
    shape = (batch_size, layout.image_size, layout.image_size, 3)
    work = (
        rng.normal(size=shape).astype(np.float32),
        rng.integers(0, layout.num_classes, batch_size).astype(np.int32),
    )
    jax_dtype = jnp.dtype(dtype)
    nets = {
        OURS: create_model(model, dtype=jax_dtype),
        f"{OURS}_xla": create_model(model, dtype=jax_dtype, conv_algorithm="xla"),
        "flax_example": peers.FlaxResNet(layout, dtype=jax_dtype),
    }
    contenders = [jax_contender(name, net, *work) for name, net in nets.items()]
    names = ["torch", "torch_channels_last"]
    names += ["torch_compiled"] * (compiled or jax.default_backend() == "gpu")
    if importlib.util.find_spec("torch") is None:
        return contenders, [{"name": n, "status": "not installed"} for n in names]
    contenders += [torch_contender(name, model, *work, dtype) for name in names]
    return contenders, []


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    if jax.device_count() != 1:
        # The peers are written for one device.
        raise SystemExit(f"needs one device, not {jax.device_count()}")
    options.batch = options.batch or BATCH_SIZES[options.model]
    content = record.circumstances("forward_backward", arguments)
    contenders, absent = make_contenders(
        options.model, options.batch, options.dtype, options.compile
    )
    hold(content, options, "forward and backward", options.dtype, contenders, absent)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forward_backward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, model="resnet50", steps=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile on the CPU too"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
