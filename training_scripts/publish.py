"""Publish the checkpoints of `model_cards/` on the Hub, each as a repository: checked, in one commit, with a tag.

hf auth login                                                 # once; or HF_TOKEN. The token is no flag on purpose
python training_scripts/publish.py --dry_run true             # checks everything, lists what would change
python training_scripts/publish.py
python training_scripts/publish.py --namespace me --private true --only base
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spcxr_hf.hub.publish import NAMESPACE, publish
from spcxr_hf.training.arguments import parse_arguments, run_script


@dataclass
class Arguments:
    """Publish checkpoints on the Hub."""

    folder: str | None = field(default=None, metadata={"help": "holds a folder per checkpoint; default: model_cards"})
    namespace: str = field(default=NAMESPACE, metadata={"help": "user or organisation that the repositories belong to"})
    private: bool = field(default=False, metadata={"help": "create repositories that only members see"})
    dry_run: bool = field(default=False, metadata={"help": "check everything, list what would change, send nothing"})
    tag: str | None = field(default=None, metadata={"help": "name of this version; default: v<package version>"})
    only: list[str] = field(default_factory=list, metadata={"help": "names of the checkpoints; default: all"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    publications = publish(
        arguments.folder,
        namespace=arguments.namespace,
        private=arguments.private,
        dry_run=arguments.dry_run,
        tag=arguments.tag,
        only=arguments.only,
    )
    for publication in publications:
        print(publication.describe())
    if arguments.dry_run:
        print("a dry run: nothing was sent")


if __name__ == "__main__":
    run_script(main)
