"""``python -m resnet_jax``: the same as ``resnet-jax``."""

import sys

from resnet_jax.cli import main

sys.exit(main())
