"""Render the table of checkpoints of a page from the results files of their cards.

    python training_scripts/checkpoint_table.py --render README.md

The table stands between `<!-- checkpoints -->` and `<!-- /checkpoints -->`. A checkpoint that is not in `model_cards/`
is left out. `{file/key/key .3f}` in a cell below stands for that entry of the card's `results/file.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spcxr_hf import SpcxrError
from spcxr_hf.benchmarking import replace_block
from spcxr_hf.recipe import parse_arguments

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
HEAD = "| id | what it is | figures on test images | beside it | card |\n|---|---|---|---|---|"
PROBE = "tasks/pneumonia/label_fraction/0.01/test/mean .4f"
DICE = (
    "Dice {segmentation/splits/test/%s/dice .3f} (children), "
    "{segmentation/splits/shift/%s/dice .3f} (adults, other hospitals)"
)
FLOOR, THUMBNAIL = "16 px thumbnails", "shortcuts/splits/test/variants/thumbnail_16"
PNEUMONIA = (
    "AUROC {%s/splits/test/classes/normal/auroc .3f} normal against pneumonia, "
    "balanced accuracy {%s/splits/test/balanced_accuracy .3f} of three classes"
)
SCREENING = "AUROC {%s/splits/test/labels/abnormal/auroc .3f} abnormal, {%s/splits/test/mean_auroc .3f} mean of labels"
COVID = (
    "AUROC {%s/splits/test/classes/covid-19/auroc .3f} COVID-19, "
    "balanced accuracy {%s/splits/test/balanced_accuracy .3f}; read the card on shortcuts"
)
# What a checkpoint is, its figures, and what stands beside them: the network with random weights (base), the mean mask
# of the training images (lungs), logistic regression on thumbnails (classifiers).
ROWS = {
    "base": (
        "ViT-S/16 encoder and reconstruction head",
        f"linear probe, children's pneumonia with 1 % of the labels: AUROC {{linear_probe/{PROBE}}}",
        f"random weights: AUROC {{linear_probe_random/{PROBE}}}",
    ),
    "lung-segmentation": (
        "lung masks of frontal radiographs",
        DICE.replace("%s", "model"),
        f"mean training mask: {DICE.replace('%s', 'mean_training_mask')}",
    ),
    "pneumonia": (
        "children: normal, bacterial or viral pneumonia",
        PNEUMONIA.replace("%s", "evaluation"),
        f"{FLOOR}: AUROC {{{THUMBNAIL}/targets/normal/auroc .3f}}, {{{THUMBNAIL}/balanced_accuracy .3f}}",
    ),
    "screening": (
        "adults: abnormal or not, and five findings",
        SCREENING.replace("%s", "evaluation"),
        f"{FLOOR}: AUROC {{{THUMBNAIL}/targets/abnormal/auroc .3f}} abnormal",
    ),
    "covid": (
        "adults: COVID-19, other pneumonia or normal",
        COVID.replace("%s", "evaluation"),
        f"{FLOOR}: AUROC {{{THUMBNAIL}/targets/covid-19/auroc .3f}}, {{{THUMBNAIL}/balanced_accuracy .3f}}",
    ),
}


@dataclass
class Arguments:
    """Render the table of checkpoints of a page."""

    render: str = field(metadata={"help": "the page"})
    cards: str = field(default=str(CARDS), metadata={"help": "folder with a folder per checkpoint"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    replace_block(Path(arguments.render), "checkpoints", checkpoint_table(Path(arguments.cards)))


def checkpoint_table(cards: Path) -> str:
    """A row for each checkpoint that is there, in Markdown.

    Raises:
        SpcxrError: a results file lacks a figure; the message names both.
    """
    lines = [HEAD]
    for name, (what, figures, without) in ROWS.items():
        if (cards / name / "model.safetensors").is_file():
            results = cards / name / "results"
            cells = [f"`spcxr/{name}`", what, fill(figures, results), fill(without, results)]
            lines.append(f"| {' | '.join(cells)} | [model_cards/{name}](model_cards/{name}/README.md) |")
    return "\n".join(lines)


def fill(text: str, results: Path) -> str:
    """The text with an entry of a results file in place of each `{file/key/key .3f}`."""

    def entry(match: re.Match) -> str:
        name, *keys = match[1].split("/")
        file = results / f"{name}.json"
        try:
            value: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpcxrError(f"{file}: cannot be read ({error})") from error
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, int | float):
            raise SpcxrError(f"{file}: no figure {'/'.join(keys)}")
        return format(value, match[2])

    return re.sub(r"\{(\S+) (\S+)\}", entry, text)


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
