"""The paper's tables and figures as data, and as runs: `resnet-jax paper`.

``experiments`` names every one: its runs, its published numbers and how it is drawn.
``run`` trains what is missing, ``report`` sets what was measured beside what was
published.
"""
