"""The residual net: a stem, stages of blocks, global average pooling and a classifier.

One module serves the ImageNet nets (Table 1), the CIFAR nets (section 4.2), the plain
nets they are compared with, and their relatives: a variant is a choice of stem, stage,
block and shortcut.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.blocks import BasicBlock
from resnet_jax.models.convolution import Conv, he_normal, loop_algorithm
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.features import FeatureMap
from resnet_jax.models.normalization import (
    NORMALIZATIONS,
    BatchNorm,
    NoNorm,
    is_frozen,
    norm_act,
)
from resnet_jax.models.pooling import max_pool_3x3
from resnet_jax.models.regularization import StochasticDepth, linear_rates
from resnet_jax.models.shortcuts import Projection, Shortcut
from resnet_jax.models.stages import Stage

fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan-in): the classifier of the released Torch nets."""


class ImageNetStem(nn.Module):
    """7x7 convolution of stride 2, normalisation, ReLU and 3x3 max-pooling of stride 2.

    The pooling pads one pixel on every side, as Torch's does.

    Attributes:
      form: how the convolution is computed, with the same parameters and, to rounding,
        the same results: "conv" as all others, or one of ``STEM_ALGORITHMS``, see
        ``models.convolution.convolve``.
    """

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    form: str = "conv"
    strides = (2, 4)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1, the map before the pooling (stride 2), and the pooled map."""
        options = {} if self.form == "conv" else {"algorithm": self.form}
        c1 = self.conv(self.features, (7, 7), strides=2, name="conv", **options)(x)
        c1 = norm_act(self.norm(name="norm"), c1, nn.relu)
        return c1, _max_pool(c1)


class DeepStem(nn.Module):
    """Three 3x3 convolutions in place of the 7x7 (ResNet-C and -D, He et al. 2019).

    Attributes:
      features: channels of the third convolution.
      inner: channels of the first two.
    """

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    inner: tuple[int, int] = (32, 32)
    strides = (2, 4)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1, the map before the pooling (stride 2), and the pooled map."""
        for index, features in enumerate((*self.inner, self.features), start=1):
            strides = 2 if index == 1 else 1
            conv = self.conv(features, (3, 3), strides=strides, name=f"conv{index}")
            x = norm_act(self.norm(name=f"norm{index}"), conv(x), nn.relu)
        return x, _max_pool(x)


class CifarStem(nn.Module):
    """3x3 convolution of stride 1, normalisation and ReLU (section 4.2)."""

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1 twice: there is no pooling."""
        x = self.conv(self.features, (3, 3), name="conv")(x)
        c1 = norm_act(self.norm(name="norm"), x, nn.relu)
        return c1, c1


POOLS_BY_HAND = False
"""Whether the stem's pooling has a gradient of its own, see ``models.pooling``."""


def _max_pool(x):
    if POOLS_BY_HAND:
        return max_pool_3x3(x)
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class ResNet(nn.Module):
    """A residual or plain net of section 3.3 or 4.2, or a relative.

    Variables: ``params`` and ``batch_stats``, float32 for every ``dtype``, under
    names that speak: ``stem/conv``, ``stage2/block3/conv2``, ``head``. Dropout and
    stochastic depth draw from the rng "dropout" in training.

    Attributes:
      stage_sizes: blocks in each stage.
      block: BasicBlock or BottleneckBlock, or a partial of one with its own options.
      shortcut: a value from ``models.shortcuts``.
      stem: ImageNetStem, DeepStem or CifarStem.
      stage: Stage, or a partial of OverlappingStage.
      width: ``features`` of the first stage; doubled at every further stage.
      stem_width: channels of the stem; None: ``width``.
      num_classes: classes of the classifier; None leaves it out.
      preactivation: blocks normalise and activate before they convolve; one more
        normalisation and activation follow the last.
      output_stride: pixels of the image between neighbours on the last map; below the
        net's own, the last stages dilate their taps in place of striding. None: the
        net's own, 32 of an ImageNet net.
      normalization: "batch", or "none": nothing is normalised, and every convolution
        has a bias, which starts at zero, as those of nets before batch normalisation.
      kernel_init: initialiser of the convolutions; the classifier has its own.
      batch_norm_groups, batch_norm_momentum, batch_norm_epsilon: see BatchNorm.
      batch_norm_frozen: normalise by the running statistics in training too, and keep
        them: True everywhere, or the names of parts, ``("stem", "stage1")``.
      norm_variance: see BatchNorm's ``variance``.
      norm_arithmetic: see BatchNorm's ``arithmetic``.
      fused_norm: see BatchNorm's ``fused``; blocks then hand it the addition too, where
        nothing stands between.
      dropout_rate: between the convolutions of a block.
      stochastic_depth_rate: with which the last block is dropped in training; it grows
        linearly from the first.
      scan, remat: see Stage.
      conv_algorithm: see ``models.convolution.convolve``.
      dtype: dtype of convolutions and maps; bfloat16 on accelerators.
    """

    stage_sizes: Sequence[int]
    block: Any = BasicBlock
    shortcut: Shortcut = Projection()
    stem: Any = ImageNetStem
    stage: Any = Stage
    width: int = 64
    stem_width: int | None = None
    num_classes: int | None = 1000
    preactivation: bool = False
    output_stride: int | None = None
    normalization: str = "batch"
    kernel_init: Any = he_normal
    batch_norm_groups: int = 1
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    batch_norm_frozen: bool | Sequence[str] = False
    norm_variance: str = "two_pass"
    norm_arithmetic: str = "wide"
    fused_norm: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    scan: bool = False
    remat: bool = False
    conv_algorithm: str = "auto"
    dtype: Any = jnp.float32

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class logits.

        Args:
          images: (n, h, w, channels), floating point.
          train: normalise by the batch's statistics and update the running ones
            (pass ``mutable=["batch_stats"]`` to ``apply``).

        Returns:
          (n, num_classes) float32 logits; (n, channels of the last map) float32
          pooled features where ``num_classes`` is None.
        """
        return self._maps_and_output(images, train)[1]

    def features(
        self, images: jax.Array, train: bool = False
    ) -> tuple[FeatureMap, ...]:
        """The maps C1 .. C5 of an ImageNet net, C1 .. C4 of a CIFAR net.

        C1 is the stem's, before pooling; each further one is the output of a stage.
        """
        return self._maps_and_output(images, train)[0]

    @nn.compact
    def _maps_and_output(self, images, train):
        conv = functools.partial(
            Conv,
            use_bias=self.normalization == "none",
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            algorithm=self.conv_algorithm,
        )
        inner_conv = conv
        if self.scan:
            algorithm = loop_algorithm(self.conv_algorithm)
            inner_conv = functools.partial(conv, algorithm=algorithm)
        stem_norm = self._norm("stem", train)
        stem_width = self.stem_width or self.width
        stem = self.stem(stem_width, conv=conv, norm=stem_norm, name="stem")
        c1, x = stem(images.astype(self.dtype))
        maps = [FeatureMap(c1, "C1", stem.strides[0])]
        plan = plan_strides(len(self.stage_sizes), stem.strides[1], self.output_stride)
        rates = linear_rates(self.stochastic_depth_rate, sum(self.stage_sizes))
        for index, (size, (strides, dilation, stride)) in enumerate(
            zip(self.stage_sizes, plan, strict=True)
        ):
            name, before = f"stage{index + 1}", sum(self.stage_sizes[:index])
            block = functools.partial(
                self.block,
                shortcut=self.shortcut,
                conv=inner_conv,
                norm=self._norm(name, train),
                preactivation=self.preactivation,
                train=train,
                **self._regularization(train),
            )
            stage = self.stage(
                size,
                features=self.width * 2**index,
                strides=strides,
                block=block,
                dilation=dilation,
                first=index == 0,
                drop_rates=rates[before : before + size] if any(rates) else None,
                scan=self.scan,
                remat=self.remat,
                name=name,
            )
            x = stage(x)
            if self.preactivation and index == len(self.stage_sizes) - 1:
                norm = self._norm("norm", train)(name="norm")
                x = norm_act(norm, x, nn.relu)
            maps.append(FeatureMap(x, f"C{index + 2}", stride))
        # In float32 at least: a bfloat16 sum over the map would lose its small terms.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        output = x.mean(axis=(1, 2), dtype=wide)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=fan_in_uniform, name="head")
            output = head(output)
        return tuple(maps), output

    def _norm(self, part, train):
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"the normalization is one of {', '.join(NORMALIZATIONS)}, "
                f"not {self.normalization!r}"
            )
        if self.normalization == "none":
            return NoNorm
        return functools.partial(
            BatchNorm,
            use_running_average=not train or is_frozen(self.batch_norm_frozen, part),
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
            groups=self.batch_norm_groups,
            variance=self.norm_variance,
            arithmetic=self.norm_arithmetic,
            fused=self.fused_norm,
            dtype=self.dtype,
        )

    def _regularization(self, train):
        options: dict[str, ModuleFactory] = {}
        if self.dropout_rate:
            options["dropout"] = functools.partial(
                nn.Dropout, self.dropout_rate, deterministic=not train
            )
        if self.stochastic_depth_rate:
            options["stochastic_depth"] = functools.partial(
                StochasticDepth, deterministic=not train
            )
        return options


def plan_strides(
    stages: int, stem_stride: int, output_stride: int | None = None
) -> list[tuple[int, tuple[int, int], int]]:
    """How each stage moves: its stride, its dilation before and behind, its output's
    stride.

    Every stage but the first halves the map until ``output_stride`` is reached; those
    behind it double the spacing of the taps instead, so that each output sees what it
    would have seen.

    Raises:
      ValueError: an ``output_stride`` that the net does not pass.
    """
    valid = [stem_stride * 2**index for index in range(stages)]
    output_stride = output_stride or valid[-1]
    if output_stride not in valid:
        raise ValueError(
            f"the output stride is one of {', '.join(map(str, valid))}, "
            f"not {output_stride}"
        )
    plan, stride, dilation = [], stem_stride, 1
    for index in range(stages):
        before, strides = dilation, 1
        if index > 0:
            if stride < output_stride:
                strides, stride = 2, stride * 2
            else:
                dilation *= 2
        plan.append((strides, (before, dilation), stride))
    return plan
