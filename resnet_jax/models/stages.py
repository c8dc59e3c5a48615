"""Stages: runs of blocks on maps of one size."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.factories import ModuleFactory, option_of
from resnet_jax.models.shortcuts import NoShortcut, Shortcut


class Stage(nn.Module):
    """Blocks on maps of one size; the first block may halve the map.

    Unrolled, the blocks are ``block1``, ``block2``, ... Scanned, all blocks after the
    first share one compiled body, and their variables are stacked under ``blocks``
    along a new first axis (``models.trees`` converts). Compiling then takes the time of
    two blocks at any depth.

    Attributes:
      size: the number of blocks.
      features: the blocks' ``features``.
      strides: stride of the first block.
      block: factory of the blocks.
      dilation: spacing of the taps in the first block's input and after it.
      first: whether this is the net's first stage.
      drop_rates: the stochastic depth rate of each block; None drops nothing.
      scan: run all blocks after the first as one loop.
      remat: keep only the blocks' inputs for the gradient and recompute the rest, which
        saves memory and takes about a third more time.
    """

    size: int
    features: int
    strides: int
    block: ModuleFactory
    dilation: tuple[int, int] = (1, 1)
    first: bool = False
    drop_rates: Sequence[float] | None = None
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), channels)."""
        rates = self.drop_rates or (0.0,) * self.size
        first = self.block(
            self.features,
            self.strides,
            dilation=self.dilation,
            position="net" if self.first else "stage",
            name="block1",
        )
        x = self._apply(first, x, rates[0])
        inner = functools.partial(
            self.block, self.features, 1, dilation=(self.dilation[1],) * 2
        )
        if self.scan and self.size > 1:
            return self._scanned(inner(name="blocks"), x, rates[1:])
        for index in range(1, self.size):
            x = self._apply(inner(name=f"block{index + 1}"), x, rates[index])
        return x

    def _scanned(self, block, x, rates):
        loop = nn.scan(
            lambda block, x, rate: (self._apply(block, x, rate), None),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.size - 1,
        )
        x, _ = loop(block, x, jnp.asarray(rates))
        return x

    def _apply(self, block, x, rate):
        if not self.remat:
            return block(x, rate)
        # A scan's body is compiled once, so it shares nothing with code outside.
        again = nn.remat(lambda block, x: block(x, rate), prevent_cse=not self.scan)
        return again(block, x)


class OverlappingStage(Stage):
    """A chain of single layers whose shortcuts overlap.

    With h_0 the stage's input: h_k = relu(norm(conv(h_{k-1})) + shortcut(h_{k-span})),
    with a shortcut wherever k - span is a multiple of ``every``. ``every=2, span=2`` is
    the stage of two-layer blocks. ``every=1, span=2`` overlaps, and with shortcut A has
    the same parameters. Use it as ``ResNet(stage=functools.partial(OverlappingStage,
    every=1, span=2))`` with BasicBlock. The layers are ``layer1``, ``layer2``, ...

    Attributes:
      size: half the number of layers: the blocks of the ordinary stage.
      every: layers between the starts of two shortcuts.
      span: layers that a shortcut spans.
      drop_rates, scan, remat: not supported.
    """

    every: int = 1
    span: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See ``Stage``."""
        if self.drop_rates or self.scan or self.remat:
            raise ValueError(
                "overlapping shortcuts have no stochastic depth, scan or remat"
            )
        maps = [x]
        place = "net" if self.first else "stage"
        for index in range(2 * self.size):
            first, start = index == 0, index + 1 - self.span
            shortcut: Shortcut = NoShortcut()
            if start >= 0 and start % self.every == 0:
                strides = self.strides if start == 0 else 1
                own = option_of(self.block, "shortcut")
                shortcut = _carries(own, maps[start], strides)
            layer = self.block(
                self.features,
                self.strides if first else 1,
                num_convs=1,
                dilation=self.dilation if first else (self.dilation[1],) * 2,
                position=place if first else "inner",
                shortcut=shortcut,
                name=f"layer{index + 1}",
            )
            maps.append(layer(maps[-1]))
        return maps[-1]


def _carries(shortcut: Shortcut, source: jax.Array, strides: int) -> Shortcut:
    """The shortcut from ``source`` with its strides, in place of the block's input."""

    def call(x, features, _, conv, norm, dilation=(1, 1)):
        return shortcut(source, features, strides, conv, norm, dilation)

    return call
