"""The residual net: a stem, stages of blocks, global average pooling and a classifier.

One module builds the ImageNet nets (Table 1), the CIFAR nets (section 4.2), the plain
nets and their relatives, by the choice of stem, stage, block, shortcut and norm.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.blocks import BasicBlock
from resnet_jax.models.conv import Conv, he_normal, loop_algorithm, variance_scaling
from resnet_jax.models.factories import (
    ModuleFactory,
    class_of,
    field_names,
)
from resnet_jax.models.features import FeatureMap, FeatureNet
from resnet_jax.models.norm import (
    BatchNorm,
    NoNorm,
    groups_of,
    is_frozen,
    is_fused,
    norm_act,
)
from resnet_jax.models.pooling import Pool, global_average, max_pool
from resnet_jax.models.shortcuts import Dropped, Projection, Shortcut
from resnet_jax.models.stages import Stage
from resnet_jax.models.wrappers import StochasticDepth, dropout_between, linear_rates

fan_in_uniform = variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan-in): the classifier of the released Torch nets."""


class ImageNetStem(nn.Module):
    """7x7 convolution of stride 2, normalisation, ReLU and 3x3 max-pooling of stride 2.

    The pooling pads one pixel on every side, as in Torch.
    """

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides = (2, 4)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1, the map before the pooling (stride 2), and the pooled map."""
        c1 = self.conv(self.features, (7, 7), strides=2, name="conv")(x)
        c1 = norm_act(self.norm(name="norm"), c1)
        return c1, _max_pool(c1, self.norm)


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
            x = norm_act(self.norm(name=f"norm{index}"), conv(x))
        return x, _max_pool(x, self.norm)


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
        c1 = norm_act(self.norm(name="norm"), x)
        return c1, c1


def _max_pool(x, norm):
    """3x3 max-pooling of stride 2; its gradient is by hand if the norm's is."""
    pool = functools.partial(max_pool, size=3, padding=1, by_hand=is_fused(norm))
    return Pool(pool)(x)


class ResNet(FeatureNet):
    """A residual or plain net of section 3.3 or 4.2, or a relative.

    Variables: ``params`` and ``batch_stats``, float32 for every ``dtype``, named
    ``stem/conv``, ``stage2/block3/conv2``, ``head``. ``features`` returns C1, the
    stem's map before pooling, and the output of each stage: C1 .. C5 of an ImageNet
    net, C1 .. C4 of a CIFAR net.

    Attributes:
      stage_sizes: the number of blocks in each stage.
      block: a class of ``models.blocks``, or a partial of one with its own options.
      shortcut: a value from ``models.shortcuts``.
      stem: ImageNetStem, DeepStem or CifarStem.
      stage: Stage, or a partial of OverlappingStage.
      width: ``features`` of the first stage; doubled at every further stage.
      stem_width: channels of the stem; None uses ``width``.
      num_classes: classes of the classifier; None omits it.
      output_stride: pixels of the image between neighbours on the last map. Below the
        net's own stride (32 for an ImageNet net) the last stages dilate their taps
        instead of striding. None is the net's own.
      norm: factory of the normalisations: ``BatchNorm``, or a partial of it with
        options, or any Linen normalisation. The net sets ``use_running_average`` and
        ``dtype`` if the class has them. With ``NoNorm`` every convolution gets a bias.
      batch_norm_frozen: normalise by the running statistics in training too, without
        updating them: True everywhere, or names of parts, ``("stem", "stage1")``.
      kernel_init: initialiser of the convolutions; the classifier has its own.
      dropout_rate: dropout between the convolutions of a block.
      stochastic_depth_rate: the probability with which training drops the last block;
        it grows linearly from the first.
      scan, remat: see Stage.
      conv_algorithm: see ``models.conv.convolve``.
      dtype: dtype of convolutions and maps; bfloat16 on accelerators.
      stages: (first, end) computes only a part of the net, such as (0, 3): the stem and
        stages 1 to 3. A part that starts later takes the map before it, and one that
        ends earlier returns its last map. Variables keep the whole net's names. None is
        the whole net.
    """

    stage_sizes: Sequence[int]
    block: ModuleFactory = BasicBlock
    shortcut: Shortcut = Projection()
    stem: ModuleFactory = ImageNetStem
    stage: ModuleFactory = Stage
    width: int = 64
    stem_width: int | None = None
    num_classes: int | None = 1000
    output_stride: int | None = None
    norm: ModuleFactory = BatchNorm
    batch_norm_frozen: bool | Sequence[str] = False
    kernel_init: Any = he_normal
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    scan: bool = False
    remat: bool = False
    conv_algorithm: str = "auto"
    dtype: Any = jnp.float32
    stages: tuple[int, int] | None = None

    @property
    def preactivation(self) -> bool:
        """Whether the blocks are pre-activation blocks.

        One more normalisation and ReLU then follow the last block.
        """
        return getattr(class_of(self.block), "preactivation", False)

    @property
    def batch_norm_groups(self) -> int:
        """Parts of the batch that are normalised separately, see BatchNorm."""
        return groups_of(self.norm)

    @nn.compact
    def _maps_and_output(self, images, train):
        first, end = self.stages or (0, len(self.stage_sizes))
        x = images.astype(self.dtype)
        maps, stem_strides = [], class_of(self.stem).strides
        if first == 0:
            conv = self._conv(self.conv_algorithm)
            norm = self._norm("stem", train)
            stem = self.stem(self.stem_width or self.width, conv, norm, name="stem")
            c1, x = stem(x)
            maps.append(FeatureMap(c1, "C1", stem_strides[0]))
        plan = plan_strides(len(self.stage_sizes), stem_strides[1], self.output_stride)
        rates = linear_rates(self.stochastic_depth_rate, sum(self.stage_sizes))
        for index in range(first, end):
            size = self.stage_sizes[index]
            strides, dilation, output_stride = plan[index]
            before = sum(self.stage_sizes[:index])
            stage = self.stage(
                size,
                features=self.width * 2**index,
                strides=strides,
                block=self._block(f"stage{index + 1}", train),
                dilation=dilation,
                first=index == 0,
                drop_rates=rates[before : before + size] if any(rates) else None,
                scan=self.scan,
                remat=self.remat,
                name=f"stage{index + 1}",
            )
            x = stage(x)
            if self.preactivation and index == len(self.stage_sizes) - 1:
                x = norm_act(self._norm("norm", train)(name="norm"), x)
            maps.append(FeatureMap(x, f"C{index + 2}", output_stride))
        if end < len(self.stage_sizes):
            return tuple(maps), x
        output = Pool(global_average)(x)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=fan_in_uniform, name="head")
            output = head(output)
        return tuple(maps), output

    def _conv(self, algorithm):
        return functools.partial(
            Conv,
            use_bias=class_of(self.norm) is NoNorm,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            algorithm=algorithm,
        )

    def _norm(self, part, train):
        average = not train or is_frozen(self.batch_norm_frozen, part)
        options = {"use_running_average": average, "dtype": self.dtype}
        known = field_names(self.norm)
        options = {key: value for key, value in options.items() if key in known}
        return functools.partial(self.norm, **options)

    def _block(self, stage, train):
        """The factory of a stage's blocks."""
        algorithm = self.conv_algorithm
        conv = self._conv(loop_algorithm(algorithm) if self.scan else algorithm)
        if self.dropout_rate:
            dropout = functools.partial(
                nn.Dropout, self.dropout_rate, deterministic=not train
            )
            conv = dropout_between(conv, dropout)
        options: dict[str, Any] = {"conv": conv, "norm": self._norm(stage, train)}
        if self.stochastic_depth_rate:
            options["stochastic_depth"] = functools.partial(
                StochasticDepth, deterministic=not train
            )
        shortcut = self.shortcut
        if isinstance(shortcut, Dropped):
            shortcut = dataclasses.replace(shortcut, train=train)
        return functools.partial(self.block, shortcut=shortcut, **options)


def plan_strides(
    stages: int, stem_stride: int, output_stride: int | None = None
) -> list[tuple[int, tuple[int, int], int]]:
    """The stride, the dilation before and after, and the output's stride of each stage.

    Every stage but the first halves the map until ``output_stride`` is reached. Later
    stages double the spacing of the taps instead, so that each output keeps its
    receptive field.

    Raises:
      ValueError: the net never has this ``output_stride``.
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
        halve = index > 0 and stride < output_stride
        before = dilation
        if halve:
            stride *= 2
        elif index > 0:
            dilation *= 2
        plan.append((2 if halve else 1, (before, dilation), stride))
    return plan
