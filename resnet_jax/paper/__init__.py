"""The paper's tables and figures as data, and their runs: `resnet-jax paper`.

``experiments`` lists them with published numbers, ``run`` trains the missing runs, and
``report`` sets published and measured numbers side by side.
"""
