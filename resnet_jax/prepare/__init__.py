"""Convert data sets to ArrayRecord shards, which training reads fast."""

from resnet_jax.prepare.dataset import prepare_dataset, verify

__all__ = ["prepare_dataset", "verify"]
