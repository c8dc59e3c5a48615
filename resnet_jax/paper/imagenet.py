"""The paper's experiments on ImageNet: Tables 2 to 5 and Figure 4.

Their data are given by `--config.data.path=FOLDER --config.data.test_split=val`;
`--dataset tiny-imagenet` trains on smaller data.
Published errors are in percent, top-1 unless they say top-5.
"""

from resnet_jax.paper.entries import Experiment, Panel, PaperRun, row

_HE2015 = "He et al. 2015"
_CENTRE = (
    "Measured here at the last checkpoint (on ImageNet crops of 224 pixels, shorter "
    "side 256): the centre crop"
)


def _imagenet(net: str) -> PaperRun:
    return PaperRun(net, f"imagenet.py:{net},he2015")


_PLAIN18, _PLAIN34 = _imagenet("plain18"), _imagenet("plain34")
_RESNET18, _RESNET34 = _imagenet("resnet18_a"), _imagenet("resnet34_a")
_RESNET34_B, _RESNET34_C = _imagenet("resnet34"), _imagenet("resnet34_c")
_RESNET50, _RESNET101, _RESNET152 = (
    _imagenet(f"resnet{depth}_v1") for depth in (50, 101, 152)
)

EXPERIMENTS = (
    Experiment(
        name="table2",
        title="Table 2: plain against residual nets on ImageNet",
        source=_HE2015,
        shows="Without shortcuts 34 layers are worse than 18; with them, better.",
        protocol=f"Published: 10-crop top-1. {_CENTRE}, and 10-crop.",
        entries=(
            row("plain-18", _PLAIN18, 27.94),
            row("plain-34", _PLAIN34, 28.54),
            row("ResNet-18", _RESNET18, 27.88),
            row("ResNet-34", _RESNET34, 25.03),
        ),
        analysis="ten_crop",
    ),
    Experiment(
        name="figure4",
        title="Figure 4: training on ImageNet",
        source=_HE2015,
        shows="plain-34 is worse than plain-18 throughout; with shortcuts, 34 layers "
        "are better.",
        protocol="Thin: training error. Bold: validation error of the centre crop.",
        entries=(
            row("plain-18", _PLAIN18),
            row("plain-34", _PLAIN34),
            row("ResNet-18", _RESNET18),
            row("ResNet-34", _RESNET34),
        ),
        figure="curves",
        panels=(
            Panel("plain nets", ("plain-18", "plain-34")),
            Panel("ResNets", ("ResNet-18", "ResNet-34")),
        ),
    ),
    Experiment(
        name="table3",
        title="Table 3: error on ImageNet validation, 10-crop",
        source=_HE2015,
        shows="Projections matter little; depth matters.",
        protocol=f"Published: 10-crop. {_CENTRE}, and 10-crop.",
        entries=(
            row("VGG-16", None, 28.07, top5=9.33),
            row("GoogLeNet", top5=9.15),
            row("PReLU-net", None, 24.27, top5=7.38),
            row("plain-34", _PLAIN34, 28.54, top5=10.02),
            row("ResNet-34 A", _RESNET34, 25.03, top5=7.76),
            row("ResNet-34 B", _RESNET34_B, 24.52, top5=7.46),
            row("ResNet-34 C", _RESNET34_C, 24.19, top5=7.40),
            row("ResNet-50", _RESNET50, 22.85, top5=6.71),
            row("ResNet-101", _RESNET101, 21.75, top5=6.05),
            row("ResNet-152", _RESNET152, 21.43, top5=5.71),
        ),
        analysis="ten_crop",
    ),
    Experiment(
        name="table4",
        title="Table 4: best single models on ImageNet validation",
        source=_HE2015,
        shows="What single nets reach when tested fully convolutionally at several "
        "scales.",
        protocol="Published: fully convolutional, mean over shorter sides 224, 256, "
        f"384, 480 and 640. {_CENTRE}, and these scales (on other data in proportion "
        "to the size of the crop).",
        entries=(
            row("VGG-16", top5=8.43, note="ILSVRC'14, test set"),
            row("GoogLeNet", top5=7.89),
            row("VGG v5", None, 24.4, top5=7.10),
            row("PReLU-net", None, 21.59, top5=5.71),
            row("BN-inception", None, 21.99, top5=5.81),
            row("ResNet-34 B", _RESNET34_B, 21.84, top5=5.71),
            row("ResNet-34 C", _RESNET34_C, 21.53, top5=5.60),
            row("ResNet-50", _RESNET50, 20.74, top5=5.25),
            row("ResNet-101", _RESNET101, 19.87, top5=4.60),
            row("ResNet-152", _RESNET152, 19.38, top5=4.49),
        ),
        analysis="multi_scale",
    ),
    Experiment(
        name="table5",
        title="Table 5: ensembles on the ImageNet test set, top-5",
        source=_HE2015,
        shows="What ensembles reach.",
        protocol="Published: on the test server, six models of different depth, only "
        "two of them of 152 layers; the other four are not published. Measured here on "
        "the validation set at the last checkpoint: the centre crop of each net below, "
        "and the ensemble of all six at the scales of Table 4. Its four shallower nets "
        "are this project's choice.",
        entries=(
            row("VGG (ILSVRC'14)", top5=7.32),
            row("GoogLeNet (ILSVRC'14)", top5=6.66),
            row("VGG v5", top5=6.8),
            row("PReLU-net", top5=4.94),
            row("BN-inception", top5=4.82),
            row("ResNet (ILSVRC'15)", top5=3.57, note="six models"),
            row("ResNet-34 B", _RESNET34_B),
            row("ResNet-34 C", _RESNET34_C),
            row("ResNet-50", _RESNET50),
            row("ResNet-101", _RESNET101),
            row("ResNet-152", _RESNET152),
        ),
        analysis="ensemble",
        seeds={_RESNET152.name: 2},
    ),
)
