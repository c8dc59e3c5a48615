"""Stages: the blocks between two changes of the map's size."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.blocks import Branch
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.shortcuts import NoShortcut


class Stage(nn.Module):
    """Blocks on maps of one size; the first block may halve the map.

    Unrolled, the blocks are ``block1``, ``block2``, ... Scanned, those behind the first
    are equal and share one compiled body: their variables lie stacked under
    ``blocks``, with the block as first axis (``models.trees`` converts). Compiling
    then takes the time of two blocks, whatever the depth.

    Attributes:
      size: the number of blocks.
      features: the blocks' ``features``.
      strides: stride of the first block.
      block: factory of the blocks.
      dilation: spacing of taps before the first block and behind it.
      first: whether it is the net's first stage.
      drop_rates: stochastic depth's rate of each block; None: none is dropped.
      scan: run the blocks behind the first as one loop.
      remat: keep only the blocks' inputs for the gradient and compute the rest again,
        which saves memory and costs about a third more time.
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
        # A loop's body is compiled once: nothing outside it could be shared with it.
        again = nn.remat(lambda block, x: block(x, rate), prevent_cse=not self.scan)
        return again(block, x)


class OverlappingStage(nn.Module):
    """A chain of single layers with a shortcut over ``span`` of them from every
    ``every``-th one.

    With h_0 the stage's input: h_k = relu(norm(conv(h_{k-1})) + shortcut(h_{k-span})),
    where the shortcut is there for the k at which k - span is a multiple of ``every``.
    ``every=2, span=2`` is the stage of two-layer blocks; ``every=1, span=2`` has spans
    that partly overlap, and with shortcut A the same parameters. To be used as
    ``ResNet(stage=functools.partial(OverlappingStage, every=1, span=2))`` with
    BasicBlock; the layers' variables are named ``layer1``, ``layer2``, ...

    Attributes:
      size: half the number of layers: blocks of the ordinary stage.
      features, strides, block, dilation, first: see ``Stage``.
      every: layers from one shortcut's start to the next one's.
      span: layers that a shortcut spans.
      drop_rates, scan, remat: have no meaning here and are refused.
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
    every: int = 1
    span: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features)."""
        if self.drop_rates or self.scan or self.remat:
            raise ValueError(
                "overlapping shortcuts have no stochastic depth, scan or remat"
            )
        maps = [x]
        for index in range(2 * self.size):
            start = index + 1 - self.span
            has_shortcut = start >= 0 and start % self.every == 0
            options: dict[str, Any] = {} if has_shortcut else {"shortcut": NoShortcut()}
            before = self.dilation[0 if index == 0 else 1]
            layer = self.block(
                self.features,
                self.strides if index == 0 else 1,
                num_convs=1,
                dilation=(before, self.dilation[1]),
                position="inner" if index else "net" if self.first else "stage",
                name=f"layer{index + 1}",
                **options,
            )
            source = maps[start] if has_shortcut else maps[-1]
            branch = Branch(source, self.strides if start <= 0 else 1)
            maps.append(layer(maps[-1], branch=branch))
        return maps[-1]
