"""The packages of the wheel. Everything else stands in pyproject.toml, which cannot say "found, and one more"."""

from setuptools import find_packages, setup

# `modeling/` stands at the top of the tree, so that it can be read and sent to the Hub by itself, and is installed
# inside our package: nothing called `modeling` ever lands in site-packages.
setup(
    packages=[*find_packages(include=["spcxr_hf*"]), "spcxr_hf.modeling"],
    package_dir={"spcxr_hf": "spcxr_hf", "spcxr_hf.modeling": "modeling"},
)
