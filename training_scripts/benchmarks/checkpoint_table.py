"""Render the tables of the checkpoints in the pages from the results files of their cards.

    python -m training_scripts.benchmarks.checkpoint_table

`<!-- checkpoints -->` and `<!-- pretraining -->` are in README.md, `<!-- absolute goals -->` in benchmarks/README.md.
A checkpoint that is not in `model_cards/` is left out. `{file/key/key}` in a cell below is that entry of the
card's `results/file.json`, with its interval.
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

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
EVIDENCE = Path(__file__).resolve().parent / "results" / "evidence_cpu_112.json"
PAGES = {
    "checkpoints": ROOT / "README.md",
    "pretraining": ROOT / "README.md",
    "absolute goals": Path(__file__).resolve().parent / "README.md",
}
HEAD = "| id | what it is | elsewhere | at home |\n|---|---|---|---|"
RSNA = "RSNA 1024, abnormal against normal"


class Row(NamedTuple):
    """A checkpoint: what it is, a figure from another source than its training's, and one from the same."""

    what: str
    elsewhere: str
    home: str


ROWS = {
    "base": Row(
        "ViT-S/16 encoder, reconstruction head",
        "linear probe, abnormal films, another processing: AUROC {elsewhere/linear_probe/RSNA 1024/auroc}",
        "the same, the training's own processing: AUROC {elsewhere/linear_probe/RSNA thorax, test/auroc}",
    ),
    "lung-segmentation": Row(
        "lungs, those behind the heart included",
        "adults with COVID-19, other hospitals: Dice {segmentation/splits/shift/model/dice}",
        "children: Dice {segmentation/splits/test/model/dice}",
    ),
    "anatomy": Row(
        "**adults**: lungs, heart, clavicles; cardiothoracic ratio",
        "lungs of adults with COVID-19, other hospitals: Dice "
        "{elsewhere/lung_masks/adults with COVID-19, other hospitals/lungs and heart/dice}",
        "JSRT, Jaccard: lungs {segmentation/splits/test/structures/lungs/model/iou}, "
        "heart {segmentation/splits/test/structures/heart/model/iou}, "
        "clavicles {segmentation/splits/test/structures/clavicles/model/iou}",
    ),
    "pneumonia": Row(
        "**children, 1 to 5 years**: normal, bacterial, viral pneumonia",
        "adults, whom it was not made for: AUROC "
        "{elsewhere/comparisons/adults, RSNA 1024, opacity against normal/auroc}",
        "AUROC {evaluation/splits/test/classes/normal/auroc}",
    ),
    "screening": Row(
        "**adults**: abnormal or not, opacity",
        f"RSNA in a processing that it has not seen: AUROC {{elsewhere/comparisons/{RSNA}/auroc}}",
        "RSNA: AUROC {evaluation/splits/test/labels/abnormal/auroc}; "
        "NIH: AUROC {evaluation/splits/nih_test/labels/abnormal/auroc}",
    ),
}


class Goal(NamedTuple):
    """A target value of a checkpoint: entries of its results files, the last key of each without `_ci95`."""

    checkpoint: str
    what: str
    least: float
    figure: str
    floors: dict[str, str]  # what it is -> entry


def _thumbnails(split: str, figure: str) -> dict[str, str]:
    """Result of logistic regression on thumbnails in this figure."""
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
    Goal("screening", "`shift` (another processing), abnormal, AUROC", 0.92,
         "evaluation/splits/shift/labels/abnormal/auroc", _thumbnails("shift", "targets/abnormal/auroc")),
    Goal("covid", "`test`, three classes, balanced accuracy", 0.95,
         "evaluation/splits/test/balanced_accuracy", _thumbnails("test", "balanced_accuracy")),
    Goal("lung-segmentation", "`test`, children, Dice", 0.96,
         "segmentation/splits/test/model/dice", {"mean mask": "segmentation/splits/test/mean_training_mask/dice"}),
    Goal("lung-segmentation", "`shift`, adults, Dice", 0.92,
         "segmentation/splits/shift/model/dice", {"mean mask": "segmentation/splits/shift/mean_training_mask/dice"}),
    *(
        Goal("anatomy", f"JSRT, even films, {name}, Jaccard", least,
             f"segmentation/splits/test/structures/{name}/model/iou",
             {"mean mask": f"segmentation/splits/test/structures/{name}/mean_training_mask/iou"})
        for name, least in (("lungs", 0.96), ("heart", 0.905), ("clavicles", 0.86))
    ),
)  # fmt: skip


@dataclass
class Arguments:
    """Render the tables of the checkpoints."""

    cards: str = field(default=str(CARDS), metadata={"help": "folder with a folder per checkpoint"})
    render: str | None = field(default=None, metadata={"help": "the page to render; by default those of the project"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    cards = Path(arguments.cards)
    blocks = {
        "checkpoints": checkpoint_table(cards),
        "pretraining": pretraining_table(cards),
        "absolute goals": goal_table(cards),
    }
    for name, content in blocks.items():
        page = Path(arguments.render or PAGES[name])
        if arguments.render is None or f"<!-- {name} -->" in page.read_text(encoding="utf-8"):
            replace_block(page, name, content)


def checkpoint_table(cards: Path) -> str:
    """A row for each checkpoint that is there, in Markdown.

    Raises:
        SpcxrError: a results file lacks a figure; the message names both.
    """
    lines = [HEAD]
    for name, row in ROWS.items():
        if (cards / name / "model.safetensors").is_file():
            cells = [row.what, *(fill(text, cards / name / "results") for text in (row.elsewhere, row.home))]
            lines.append(f"| [`spcxr/{name}`](model_cards/{name}/README.md) | {' | '.join(cells)} |")
    return "\n".join(lines)


def pretraining_table(cards: Path) -> str:
    """What pretraining adds to the same network and budget: three tasks with 10 % of the labels, and the lungs."""
    lines = ["| task | figure | pretrained | from scratch |", "|---|---|---|---|"]
    tasks = read_entry(EVIDENCE.parent, f"{EVIDENCE.stem}/fine_tuning")
    for task, entry in tasks.items():
        inits = entry["fractions"]["0.1"]["inits"]
        found = [inits[init]["reports"][entry["main"]]["auroc"] for init in ("spcxr", "scratch")]
        cells = [with_interval(figure["mean"], figure["ci95"]) for figure in found]
        lines.append(f"| {task}, 10 % of the labels | AUROC | {' | '.join(cells)} |")
    results = cards / "lung-segmentation" / "results"
    cells = [fill(f"{{segmentation_{name}/splits/shift/model/dice}}", results) for name in ("first_stage", "scratch")]
    lines.append(f"| lungs, adults of other hospitals | Dice | {' | '.join(cells)} |")
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
    """The text with a figure of a results file for each `{file/key}` (and interval) or `{file/key .0%}`."""

    def entry(match: re.Match) -> str:
        found = read_entry(results, match[1])
        return format(found, match[2]) if match[2] else with_interval(found, read_entry(results, f"{match[1]}_ci95"))

    return re.sub(r"\{([^{}]+?)(?: (\.\d[f%]))?\}", entry, text)


def with_interval(value: float, interval: Sequence[float]) -> str:
    """`0.914 [0.893, 0.934]`."""
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


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
    if value is None:
        raise SpcxrError(f"{file}: no figure {'/'.join(keys)}")
    return value


if __name__ == "__main__":
    run_script(main)
