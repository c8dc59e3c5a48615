"""The paper's experiments on ImageNet: Tables 2 to 5 and Figure 4.

They run where the data are: `--config.data.path=FOLDER --config.data.test_split=val`.
Published errors are in percent, top-1 unless they say otherwise.
"""

from resnet_jax.paper.entries import Experiment, Panel, PaperRun, Published, TableRow

_HE2015 = "He et al. 2015"
_CENTRE = (
    "Measured here: the centre crop of 224 pixels, shorter side 256, at the last "
    "checkpoint."
)


def _imagenet(net: str) -> PaperRun:
    return PaperRun(net, f"imagenet.py:{net},he2015")


PLAIN18, PLAIN34 = _imagenet("plain18"), _imagenet("plain34")
RESNET18, RESNET34 = _imagenet("resnet18_a"), _imagenet("resnet34_a")
RESNET34_B, RESNET34_C = _imagenet("resnet34"), _imagenet("resnet34_c")
RESNET50, RESNET101, RESNET152 = (
    _imagenet(f"resnet{depth}_v1") for depth in (50, 101, 152)
)

TABLE2 = Experiment(
    name="table2",
    title="Table 2: plain against residual nets on ImageNet",
    source=_HE2015,
    shows="34 layers are worse than 18 without shortcuts, and better with them.",
    protocol=f"Published: 10-crop top-1. {_CENTRE}",
    entries=(
        TableRow("plain-18", PLAIN18, Published(27.94)),
        TableRow("plain-34", PLAIN34, Published(28.54)),
        TableRow("ResNet-18", RESNET18, Published(27.88)),
        TableRow("ResNet-34", RESNET34, Published(25.03)),
    ),
)

FIGURE4 = Experiment(
    name="figure4",
    title="Figure 4: training on ImageNet",
    source=_HE2015,
    shows="plain-34 is worse than plain-18 throughout; with shortcuts the order turns.",
    protocol="Thin: training error; bold: the validation error of the centre crop.",
    entries=(
        TableRow("plain-18", PLAIN18),
        TableRow("plain-34", PLAIN34),
        TableRow("ResNet-18", RESNET18),
        TableRow("ResNet-34", RESNET34),
    ),
    figure="curves",
    panels=(
        Panel("plain nets", ("plain-18", "plain-34")),
        Panel("ResNets", ("ResNet-18", "ResNet-34")),
    ),
)

TABLE3 = Experiment(
    name="table3",
    title="Table 3: error on ImageNet validation, 10-crop",
    source=_HE2015,
    shows="Projections matter little; depth matters.",
    protocol=f"Published: 10-crop top-1. {_CENTRE}",
    entries=(
        TableRow("VGG-16", None, Published(28.07)),
        TableRow("PReLU-net", None, Published(24.27)),
        TableRow("plain-34", PLAIN34, Published(28.54)),
        TableRow("ResNet-34 A", RESNET34, Published(25.03)),
        TableRow("ResNet-34 B", RESNET34_B, Published(24.52)),
        TableRow("ResNet-34 C", RESNET34_C, Published(24.19)),
        TableRow("ResNet-50", RESNET50, Published(22.85)),
        TableRow("ResNet-101", RESNET101, Published(21.75)),
        TableRow("ResNet-152", RESNET152, Published(21.43)),
    ),
)

TABLE4 = Experiment(
    name="table4",
    title="Table 4: best single models on ImageNet validation",
    source=_HE2015,
    shows="What single nets reach with a fully convolutional test at several scales.",
    protocol="Published: top-1, fully convolutional, mean over shorter sides 224, 256, "
    f"384, 480 and 640. {_CENTRE} The test at several scales is not built yet.",
    entries=(
        TableRow("VGG v5", None, Published(24.4)),
        TableRow("PReLU-net", None, Published(21.59)),
        TableRow("BN-inception", None, Published(21.99)),
        TableRow("ResNet-34 B", RESNET34_B, Published(21.84)),
        TableRow("ResNet-34 C", RESNET34_C, Published(21.53)),
        TableRow("ResNet-50", RESNET50, Published(20.74)),
        TableRow("ResNet-101", RESNET101, Published(19.87)),
        TableRow("ResNet-152", RESNET152, Published(19.38)),
    ),
)

TABLE5 = Experiment(
    name="table5",
    title="Table 5: ensembles on the ImageNet test set, top-5",
    source=_HE2015,
    shows="What ensembles reach.",
    protocol="Published: top-5 on the test server. Ensembles are not built yet: "
    "nothing is measured here.",
    entries=(
        TableRow("VGG (ILSVRC'14)", None, Published(7.32)),
        TableRow("GoogLeNet (ILSVRC'14)", None, Published(6.66)),
        TableRow("VGG v5", None, Published(6.8)),
        TableRow("PReLU-net", None, Published(4.94)),
        TableRow("BN-inception", None, Published(4.82)),
        TableRow("ResNet (ILSVRC'15)", None, Published(3.57, note="six models")),
    ),
)

EXPERIMENTS = (TABLE2, FIGURE4, TABLE3, TABLE4, TABLE5)
