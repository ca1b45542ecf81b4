"""Render the table of checkpoints of a page, and that of their goals, from the results files of their cards.

    python -m training_scripts.benchmarks.checkpoint_table --render README.md

They stand between `<!-- checkpoints -->` and `<!-- /checkpoints -->`, and `<!-- absolute goals -->` and its end. A
checkpoint that is not in `model_cards/` is left out. `{file/key/key .3f}` in a cell below stands for that entry of the
card's `results/file.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spcxr_hf import SpcxrError
from spcxr_hf.training.arguments import parse_arguments, run_script
from training_scripts.benchmarks.lib.timing import replace_block

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
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


class Goal(NamedTuple):
    """A figure that a checkpoint is to reach: entries of its results files, the last key of each without `_ci95`."""

    checkpoint: str
    what: str
    least: float
    figure: str
    floors: dict[str, str]  # what it is -> entry


def _thumbnails(split: str, figure: str) -> dict[str, str]:
    """What logistic regression on thumbnails reaches in this figure."""
    return {f"{side} px": f"shortcuts/splits/{split}/variants/thumbnail_{side}/{figure}" for side in (16, 32)}


ILL = "bacterial pneumonia + viral pneumonia"
GOAL_HEAD = "| checkpoint | figure | goal | found | floor | state |\n|---|---|---|---|---|---|"
GOALS = (
    Goal("pneumonia", "`test`, normal against pneumonia, AUROC", 0.985,
         "evaluation/splits/test/classes/normal/auroc", _thumbnails("test", "targets/normal/auroc")),
    Goal("pneumonia", "`test`, normal against pneumonia, accuracy", 0.94,
         f"calibration/splits/test/operating_points/{ILL}/youden/accuracy",
         _thumbnails("test", f"targets/{ILL}/accuracy")),
    Goal("pneumonia", "`test`, three classes, balanced accuracy", 0.85,
         "evaluation/splits/test/balanced_accuracy", _thumbnails("test", "balanced_accuracy")),
    Goal("pneumonia", "`val`, normal against pneumonia, AUROC", 0.997,
         "evaluation/splits/val/classes/normal/auroc", _thumbnails("val", "targets/normal/auroc")),
    Goal("pneumonia", "`val`, normal against pneumonia, accuracy", 0.98,
         f"calibration/splits/val/operating_points/{ILL}/youden/accuracy",
         _thumbnails("val", f"targets/{ILL}/accuracy")),
    Goal("screening", "`test`, abnormal, AUROC", 0.90,
         "evaluation/splits/test/labels/abnormal/auroc", _thumbnails("test", "targets/abnormal/auroc")),
    Goal("covid", "`test`, three classes, balanced accuracy", 0.95,
         "evaluation/splits/test/balanced_accuracy", _thumbnails("test", "balanced_accuracy")),
    Goal("lung-segmentation", "`test`, children, Dice", 0.96,
         "segmentation/splits/test/model/dice", {"mean mask": "segmentation/splits/test/mean_training_mask/dice"}),
    Goal("lung-segmentation", "`shift`, adults, Dice", 0.92,
         "segmentation/splits/shift/model/dice", {"mean mask": "segmentation/splits/shift/mean_training_mask/dice"}),
)  # fmt: skip


@dataclass
class Arguments:
    """Render the table of checkpoints of a page, and that of their goals."""

    render: str = field(metadata={"help": "the page"})
    cards: str = field(default=str(CARDS), metadata={"help": "folder with a folder per checkpoint"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    replace_block(Path(arguments.render), "checkpoints", checkpoint_table(Path(arguments.cards)))
    replace_block(Path(arguments.render), "absolute goals", goal_table(Path(arguments.cards)))


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


def goal_table(cards: Path) -> str:
    """A row for each goal of a checkpoint that is there: what was found, what its floor reaches, and the state.

    Raises:
        SpcxrError: a results file lacks a figure; the message names both.
    """
    lines = [GOAL_HEAD]
    for goal in GOALS:
        results = cards / goal.checkpoint / "results"
        if (results.parent / "model.safetensors").is_file():
            found, (low, high) = read_entry(results, goal.figure), read_entry(results, f"{goal.figure}_ci95")
            floors = "; ".join(f"{name} {read_entry(results, entry):.3f}" for name, entry in goal.floors.items())
            said = f"{found:.4f} [{low:.3f}, {high:.3f}]"  # a digit more: just below a goal is not at it
            state = "reached" if found >= goal.least else "missed"
            cells = [f"`spcxr/{goal.checkpoint}`", goal.what, f"{goal.least:g}", said, floors, state]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str, results: Path) -> str:
    """The text with an entry of a results file in place of each `{file/key/key .3f}`."""

    def entry(match: re.Match) -> str:
        return format(read_entry(results, match[1]), match[2])

    return re.sub(r"\{(\S+) (\S+)\}", entry, text)


def read_entry(results: Path, entry: str) -> Any:
    """A figure, or an interval of two, by the name of its results file and the keys in it: `file/key/key`.

    Raises:
        SpcxrError: there is none; the message names both.
    """
    name, *keys = entry.split("/")
    file = results / f"{name}.json"
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{file}: cannot be read ({error})") from error
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float | list):
        raise SpcxrError(f"{file}: no figure {'/'.join(keys)}")
    return value


if __name__ == "__main__":
    run_script(main)
