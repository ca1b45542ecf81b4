"""Make a trained model a folder under `model_cards/`: half-precision weights, configs, code, recipe, results, card.

    python training_scripts/prepare_checkpoint.py --name base --model runs/pretrain/final --results runs/probe.json

The card is rendered from `training_scripts/cards/<name>.md`, in which `{{ probe/tasks/pneumonia/metric }}` stands for
that entry of the results file `probe.json`. `--card_only true` renews card and code and leaves the weights alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

import spcxr_hf
from spcxr_hf import SpcxrError, SpcxrImageProcessor
from spcxr_hf.recipe import parse_arguments, read_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
CARDS = Path(__file__).resolve().parent / "cards"
LARGEST_FILE = 50_000_000  # bytes
# Where things lay on the machine that trained; the card gives the command with names in their place.
MACHINE_KEYS = ("data", "output", "cache", "init_from")


@dataclass
class Arguments:
    """Make a trained model a Hub repository, ready to upload."""

    name: str = field(metadata={"help": "last part of the id: base, lung-segmentation, ..."})
    model: str | None = field(default=None, metadata={"help": "folder `final` of the training run"})
    results: list[str] = field(default_factory=list, metadata={"help": "JSON files with the figures on the card"})
    cards: str = field(default=str(REPOSITORY / "model_cards"), metadata={"help": "where the folder is made"})
    card_only: bool = field(default=False, metadata={"help": "renew the card, the code and these results alone"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    folder = Path(arguments.cards) / arguments.name
    if not arguments.card_only:
        if arguments.model is None:
            raise SpcxrError("--model is needed unless --card_only true")
        copy_model(Path(arguments.model), folder)
        copy_recipe(Path(arguments.model), folder)
    copy_results([Path(result) for result in arguments.results], folder)
    copy_code(folder)
    (folder / "README.md").write_text(render_card(arguments.name, folder), encoding="utf-8")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def copy_model(source: Path, folder: Path) -> None:
    """Weights in float16, loaded as float32 again, with the image processor and the code that loads both."""
    config = AutoConfig.from_pretrained(source)
    model_class = getattr(spcxr_hf, config.architectures[0])
    model = model_class.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved["dtype"] = "float32"  # half precision is for the way; to compute in it is the user's choice
    (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    SpcxrImageProcessor.from_pretrained(source).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGEST_FILE:
        raise SpcxrError(f"{folder / 'model.safetensors'}: {size} bytes; a file may have {LARGEST_FILE}")


def copy_code(folder: Path) -> None:
    """The files that load the weights elsewhere, as they are in the tree now."""
    for source in (REPOSITORY / "modeling").glob("*_spcxr.py"):
        shutil.copyfile(source, folder / source.name)


def copy_recipe(source: Path, folder: Path) -> None:
    """The resolved recipe without the places of the machine that trained."""
    recipe = {key: value for key, value in read_recipe(source / "recipe.yaml").items() if key not in MACHINE_KEYS}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def copy_results(sources: Sequence[Path], folder: Path) -> None:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / "results" / source.name)


def render_card(name: str, folder: Path) -> str:
    """The card of a checkpoint, every `{{ file/key/key }}` replaced by that entry of `results/file.json`.

    Raises:
        SpcxrError: there is no such template, results file or entry.
    """
    template = CARDS / f"{name}.md"
    if not template.is_file():
        raise SpcxrError(f"{template}: no card for this checkpoint")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "results").glob("*.json")}
    results["config"] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results["recipe"] = read_recipe(folder / "recipe.yaml")

    def entry(match: re.Match) -> str:
        value: Any = results
        for key in match[1].split("/"):
            if not isinstance(value, Mapping) or key not in value:
                raise SpcxrError(f"{template}: no result {match[1]!r} in {folder}")
            value = value[key]
        return "–".join(str(end) for end in value) if isinstance(value, list) else str(value)

    return re.sub(r"\{\{ ([^{}]+) \}\}", entry, template.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
