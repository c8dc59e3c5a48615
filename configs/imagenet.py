r"""ImageNet: a net and one of the published recipes for it.

resnet-jax train --config imagenet:resnet50,rsb_a2 --workdir runs/resnet50 \
    --config.data.path=/data/imagenet --config.data.test_split=val

The argument is NET or NET,RECIPE. A recipe is a file in configs/recipes/, which states
its source, its expected error and its differences from the original:

  he2015          the paper's (the default)
  fb2016          fb.resnet.torch: other crops, colour jitter, 90 epochs
  goyal2017       batches of 8,192
  rsb_a1, _a2, _a3  "ResNet strikes back": 600, 300 and 100 epochs
  torchvision_v2  the newer weights of torchvision: 600 epochs

`imagenet:resnet50,rsb_a2` is `recipes/rsb_a2:resnet50`.
"""

import runpy
from pathlib import Path

from resnet_jax.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"


def get_config(choice="resnet50,he2015"):
    """The config of a run; ``choice`` is a net, or a net and a recipe: net,recipe."""
    net, _, recipe = choice.partition(",")
    recipe = recipe or "he2015"
    names = sorted(path.stem for path in RECIPES.glob("*.py"))
    if recipe not in names:
        raise UserError(f"there is no recipe {recipe!r}; {nearest(recipe, names)}")
    return runpy.run_path(str(RECIPES / f"{recipe}.py"))["get_config"](net)
