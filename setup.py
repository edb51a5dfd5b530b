"""What pyproject.toml cannot say: packages are looked up, and configs/ is one of them under another name."""

import setuptools

setuptools.setup(packages=[*setuptools.find_packages(include=["skysense_jax*"]), "skysense_jax.configs"])
