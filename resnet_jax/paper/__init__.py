"""The paper's tables and figures as data, and as runs: `resnet-jax paper`.

``experiments`` lists them with their runs, published numbers and figures. ``run``
trains the missing runs, ``report`` shows published and measured numbers side by side.
"""
