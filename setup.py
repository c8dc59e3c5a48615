"""What pyproject.toml cannot say: configs/ goes into the package that is installed.

In a checkout it stays beside the package, where one reads and changes it.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["resnet_jax", "resnet_jax.*"]),
        "resnet_jax.configs",
        "resnet_jax.configs.detection",
        "resnet_jax.configs.recipes",
    ],
    package_dir={
        "resnet_jax.configs": "configs",
        "resnet_jax.configs.detection": "configs/detection",
        "resnet_jax.configs.recipes": "configs/recipes",
    },
)
