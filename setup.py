"""The packages of the wheel. Everything else stands in pyproject.toml, which cannot say "found, and two more"."""

from setuptools import find_packages, setup

# `modeling/` and `training_scripts/` stand at the top of the tree, so that the one can be read and sent to the Hub by
# itself and the other be started by its path. They are installed inside our package: nothing called `modeling` or
# `training_scripts` ever lands in site-packages. `training_scripts/benchmarks` stays in the tree.
setup(
    packages=[*find_packages(include=["spcxr_hf*"]), "spcxr_hf.modeling", "spcxr_hf.training_scripts"],
    package_dir={
        "spcxr_hf": "spcxr_hf",
        "spcxr_hf.modeling": "modeling",
        "spcxr_hf.training_scripts": "training_scripts",
    },
)
