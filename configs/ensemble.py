r"""The paper's ensemble for Table 5: six nets, tested fully convolutionally.

resnet-jax evaluate --ensemble-config ensemble:runs/paper/imagenet \
    --data /data/imagenet --split val

The argument is the folder of the runs; `resnet-jax paper run table5` trains them. The
paper combines "six models of different depth", two of them with 152 layers, and does
not name the others; ours are the nets of Table 4. The paper's 3.57 % is the top-5 error
on ImageNet's test set. Measured here: not measured.
"""

import ml_collections

NETS = (
    *("resnet34/seed-0", "resnet34_c/seed-0", "resnet50_v1/seed-0"),
    *("resnet101_v1/seed-0", "resnet152_v1/seed-0", "resnet152_v1/seed-1"),
)


def get_config(folder="runs/paper/imagenet"):
    """Members as (weights, protocol), and how they are averaged."""
    members = tuple((f"{folder}/{net}", "multi_scale") for net in NETS)
    return ml_collections.ConfigDict({"average": "probabilities", "members": members})
