"""Make a checkpoint folder under `model_cards/` from a trained model: half-precision weights, configs, code, recipe,
results, card.

    python training_scripts/prepare_checkpoint.py --name base --model runs/pretrain/final --results runs/probe.json

The card is rendered from `training_scripts/cards/<name>.md`, in which `{{ probe/tasks/pneumonia/metric }}` stands for
that entry of the results file `probe.json`, `{{ probe/tasks/pneumonia/metric | .3f }}` for the same in a format, and
`{{ probe/tasks/pneumonia/test | >=0.9 }}` for "reached" or "missed". A card whose results lack an entry is not
rendered. `--card_only true` renews card and code and leaves the weights alone.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import torch
import yaml

from spcxr_hf import SpcxrError
from spcxr_hf.files import write_json
from spcxr_hf.hub.expected_outputs import RECORD, record_outputs
from spcxr_hf.hub.folder import write_code
from spcxr_hf.models.loading import load_config, load_network, load_processor, own_class
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script
from spcxr_hf.training.run_report import read_cost

CARDS = Path(__file__).resolve().parent / "cards"
LARGEST_FILE = 50_000_000  # bytes
# Paths of the training machine; the card's command has placeholders in their place.
MACHINE_KEYS = ("data", "output", "cache_folder", "init_from")


@dataclass
class Arguments:
    """Make a Hub repository from a trained model."""

    name: str = field(metadata={"help": "last part of the id: base, lung-segmentation, ..."})
    model: str | None = field(default=None, metadata={"help": "folder `final` of the training run"})
    results: list[str] = field(default_factory=list, metadata={"help": "JSON files with the figures on the card"})
    runs: list[str] = field(
        default_factory=list, metadata={"help": "folders of the trainings' runs, for results/training_cost.json"}
    )
    pictures: list[str] = field(default_factory=list, metadata={"help": "PNG files that the card shows"})
    cards: str = field(default="model_cards", metadata={"help": "where the folder is made"})
    card_only: bool = field(default=False, metadata={"help": "renew the card, the code and these results alone"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    folder = Path(arguments.cards) / arguments.name
    if not arguments.card_only:
        if arguments.model is None:
            raise SpcxrError("--model is needed unless --card_only true")
        copy_model(Path(arguments.model), folder)
        copy_recipe(Path(arguments.model), folder)
    copy_files([Path(result) for result in arguments.results], folder / "results")
    copy_files([Path(picture) for picture in arguments.pictures], folder / "pictures")
    count_cost(arguments.runs, folder / "results")
    write_code(folder)
    if not arguments.card_only or not (folder / RECORD).is_file():
        record_outputs(folder)
    (folder / "README.md").write_text(render_card(arguments.name, folder), encoding="utf-8")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def copy_model(source: Path, folder: Path) -> None:
    """Weights in float16, loaded as float32 again, with the image processor and the code that loads both.

    `intended_use` is written by hand into the folder's config.json; where the trained model states none, it stays.
    """
    before = folder / "config.json"
    stated = json.loads(before.read_text(encoding="utf-8")).get("intended_use") if before.is_file() else None
    model, _ = load_network(own_class(load_config(str(source), any_family=False)), str(source), dtype=torch.float16)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stated is not None and saved.get("intended_use") is None:
        saved["intended_use"] = stated
    saved["dtype"] = "float32"  # stored in half precision, loaded in float32
    (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    load_processor(str(source)).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGEST_FILE:
        raise SpcxrError(f"{folder / 'model.safetensors'}: {size} bytes; a file may have {LARGEST_FILE}")


def copy_recipe(source: Path, folder: Path) -> None:
    """The resolved recipe without the training machine's paths."""
    recipe = {key: value for key, value in read_recipe(source / "recipe.yaml").items() if key not in MACHINE_KEYS}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def copy_files(sources: Sequence[Path], folder: Path) -> None:
    """Copy figures or pictures under their names."""
    for source in sources:
        if not source.is_file():
            raise SpcxrError(f"{source}: no such file")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / source.name)


def count_cost(runs: Sequence[str], folder: Path) -> None:
    """Total cost of the trainings: device, minutes, views and views per second, by their reports."""
    if not runs:
        return
    cost = read_cost(runs)
    if cost is None:
        raise SpcxrError(f"{', '.join(runs)}: one of these runs has not ended")
    write_json(folder / "training_cost.json", cost)


def render_card(name: str, folder: Path) -> str:
    """The card of a checkpoint, every `{{ file/key/key }}` replaced by that entry of `results/file.json`.

    A slash with blanks around it is part of a key. `{{ file/key | .3f }}` formats a number, or each number of a list;
    `{{ file/key | >=0.9 }}` tells whether a goal is "reached" or "missed".

    Raises:
        SpcxrError: there is no such template, results file or entry, or no figure in it; the message names the entry.
    """
    template = CARDS / f"{name}.md"
    if not template.is_file():
        raise SpcxrError(f"{template}: no card for this checkpoint")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "results").glob("*.json")}
    results["config"] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results["recipe"] = read_recipe(folder / "recipe.yaml")

    def entry(match: re.Match) -> str:
        value: Any = results
        for key in re.split(r"(?<! )/(?! )", match[1]):
            if not isinstance(value, Mapping) or key not in value:
                raise SpcxrError(f"{template}: no result {match[1]!r} in {folder}")
            value = value[key]
        values = value if isinstance(value, list) else [value]
        if None in values or not values:
            raise SpcxrError(f"{template}: no figure in the result {match[1]!r} in {folder}")
        form = match[2] or ""
        if form.startswith(">="):
            return "reached" if value >= float(form.removeprefix(">=")) else "missed"
        return "–".join(format(one, form) for one in values)

    return re.sub(r"\{\{ ([^{}|]+?)(?: \| ([^{} ]+))? \}\}", entry, template.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
