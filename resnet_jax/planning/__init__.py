"""Checks of a training run on paper: ``plan`` and ``print_plan``.

Nothing runs on a device: the real training step is traced, its arrays and work are
counted, and published figures of chips make bounds of them. See ``docs/plan.md``.
"""

from resnet_jax.planning.plan import Plan, plan
from resnet_jax.planning.tables import print_plan

__all__ = ["Plan", "plan", "print_plan"]
