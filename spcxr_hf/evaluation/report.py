"""The report on a classifier: figures, PNGs and one HTML file that holds them all and needs nothing else.

write_evaluation_report -> _draw_all (one figure after the other) -> report.html, results.json

The contact sheet of worst cases shows radiographs, in `worst_*.png` and in the HTML file: keep a report folder where
the images themselves may be, never into a repository. `images=None` leaves them out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.calibration import decision_figures, target_columns, target_values
from spcxr_hf.evaluation.curves import (
    Curve,
    confusion,
    precision_recall_curve,
    reliability,
    roc_curve,
)
from spcxr_hf.evaluation.metrics import classification_report, multilabel_report
from spcxr_hf.evaluation.plots import (
    draw_confusion,
    draw_contact_sheet,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    save_figure,
)
from spcxr_hf.files import atomic_file, render_page, software_versions, write_json

NOTICE = "For research use only, not for clinical use."
WORST = 12
WORDS = {
    "auroc": "AUROC",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "sensitivity_at_specificity": "sensitivity at specificity 0.90",
}


@dataclass(frozen=True)
class Evaluated:
    """Predictions of a classifier on one split, with the true labels.

    Attributes:
        name: The split.
        probabilities: (n, classes) in 0 .. 1; rows sum to 1 where classes exclude each other.
        targets: (n, classes) 1, 0, or NaN where a label is missing.
        ids: (n) what to call each image.
        patients: (n) whose image each row is, None where unknown; None altogether where the set does not tell.
    """

    name: str
    probabilities: np.ndarray
    targets: np.ndarray
    ids: Sequence[str]
    patients: Sequence[Any] | None = None


@dataclass
class ReportOptions:
    """What a report shows beside the figures.

    Attributes:
        multi_label: Whether labels may hold together.
        sums: More targets, labels joined by " + ", whose probabilities are added.
        points: Target -> name of an operating point -> threshold (`SpcxrConfig.operating_points`); marked on the curves
            of the first split, and tabled.
        settings: What was run, by name, for the last table. Use names, not paths, which may identify people.
        worst: How many of the most confident errors to show.
        resamples: Draws of the bootstrap.
        seed: Of the bootstrap.
    """

    multi_label: bool = False
    sums: Sequence[str] = ()
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    worst: int = WORST
    resamples: int = 1000
    seed: int = 0


@dataclass
class _Page:
    """The report as it grows: its sections in order, and the numbers for results.json."""

    folder: Path
    sections: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def add_figure(self, name: str, title: str, figure: Any, words: str) -> None:
        """Write `name`.png, and show it under a title; `words` describe it, also as the alternative text."""
        data = base64.b64encode(save_figure(figure, self.folder / f"{name}.png").read_bytes()).decode("ascii")
        self.sections.append({"title": title, "png": data, "caption": words})

    def add_table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.sections.append({"title": title, "header": header, "rows": rows})


def write_evaluation_report(
    folder: Path,
    title: str,
    names: Sequence[str],
    splits: Sequence[Evaluated],
    options: ReportOptions | None = None,
    images: Callable[[str, int], np.ndarray] | None = None,
) -> Path:
    """Write `report.html`, its pictures as PNG, and `results.json`; returns the first, which loads nothing.

    Args:
        folder: Where to; made if need be, files of these names are replaced.
        title: Of the page.
        names: What to call each class.
        splits: At least one; curves of several are drawn in one panel.
        options: See there.
        images: Gives the picture (H, W) in 0 .. 1 of a split's row, for the worst cases; None leaves those out.
    """
    options = options or ReportOptions()
    _check(names, splits, options.multi_label)
    page = _Page(Path(folder))
    _add_figures_table(page, names, splits, options)
    _add_curves(page, names, splits, options)
    _add_points(page, names, splits, options)
    _add_calibration(page, names, splits, options)
    _add_confusion(page, names, splits, options)
    if images is not None:
        _add_worst(page, names, splits, options, images)
    page.add_table("What was run", ("setting", "value"), [*options.settings.items(), ("software", software_versions())])
    write_json(page.folder / "results.json", {"title": title, "notice": NOTICE, **page.results})
    text = render_page("spcxr_hf.evaluation", "report.html", title=title, notice=NOTICE, sections=page.sections)
    with atomic_file(page.folder / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")
    return page.folder / "report.html"


def _check(names: Sequence[str], splits: Sequence[Evaluated], multi_label: bool) -> None:
    if not splits or len({one.name for one in splits}) < len(splits):
        raise SpcxrError("a report needs at least one split, each with a unique name")
    for one in splits:
        shape = (len(one.ids), len(names))
        if np.shape(one.probabilities) != shape or np.shape(one.targets) != shape or not one.ids:
            raise SpcxrError(
                f"{one.name}: probabilities {np.shape(one.probabilities)} and targets {np.shape(one.targets)} "
                f"must be {shape}, an id for each row and a name for each class"
            )
        if not multi_label and not ((np.asarray(one.targets) == 1).sum(axis=1) == 1).all():
            raise SpcxrError(f"{one.name}: of classes that exclude each other, each row has one that is 1")


# ---- sections ------------------------------------------------------------------------------------------------------


def _add_figures_table(page: _Page, names: Sequence[str], splits: Sequence[Evaluated], options: ReportOptions) -> None:
    """The figures of `metrics`, which go to results.json whole; the table shows those of the whole split."""
    reports = {}
    draws = {"resamples": options.resamples, "seed": options.seed}
    for one in splits:
        if options.multi_label:
            reports[one.name] = multilabel_report(one.probabilities, one.targets, names, one.patients, **draws)
        else:
            truths = np.nan_to_num(one.targets).argmax(axis=1)
            reports[one.name] = classification_report(one.probabilities, truths, names, one.patients, **draws)
    page.results["splits"] = reports
    figures = [key for key in next(iter(reports.values())) if f"{key}_ci95" in next(iter(reports.values()))]
    rows: list[list[Any]] = [["images", *(len(one.ids) for one in splits)]]
    rows += [["patients", *(report.get("patients") or "not known" for report in reports.values())]]
    for figure in figures:
        cells = [_with_interval(report[figure], report[f"{figure}_ci95"]) for report in reports.values()]
        rows.append([in_words(figure), *cells])
    page.add_table("Figures, with 95 % intervals", ("figure", *reports), rows)


def in_words(figure: str) -> str:
    """What a reader calls a figure of `spcxr_hf.evaluation.metrics`."""
    name = figure.removeprefix("macro_").removeprefix("mean_")
    return WORDS.get(name, name.replace("_", " ")) + (", mean" if name != figure else "")


def _with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    if value is None:
        return "not defined"
    low, high = interval
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _targets(names: Sequence[str], options: ReportOptions) -> list[str]:
    """What curves are drawn of: each class (the second alone of two that exclude each other), then the sums."""
    own = list(names[1:]) if len(names) == 2 and not options.multi_label else list(names)
    return list(dict.fromkeys([*own, *options.sums]))


def _columns(one: Evaluated, target: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth (n,) of a target; of joined labels any that holds counts."""
    truth = one.targets[:, target_columns(target, names)]
    joined = np.where((truth == 1).any(axis=1), 1.0, np.where(np.isnan(truth).any(axis=1), np.nan, 0.0))
    return target_values(one.probabilities, target, names), joined


def _add_curves(page: _Page, names: Sequence[str], splits: Sequence[Evaluated], options: ReportOptions) -> None:
    for name, title, build in (
        ("roc", "ROC", roc_curve),
        ("precision_recall", "Precision and recall", precision_recall_curve),
    ):
        panels: dict[str, dict[str, Curve]] = {}
        for target in _targets(names, options):
            curves = {}
            for one in splits:
                scores, truth = _columns(one, target, names)
                if {0.0, 1.0} <= set(truth.tolist()):
                    curves[one.name] = build(scores, truth, one.patients, options.resamples, options.seed)
            if curves:
                panels[target] = curves
        if not panels:
            continue
        figure = (
            draw_roc(panels, _marked(names, splits[0], options)) if name == "roc" else draw_precision_recall(panels)
        )
        words = "; ".join(
            f"{target}, {split}: {_with_interval(curve.area, curve.interval)}"
            for target, curves in panels.items() for split, curve in curves.items()
        )  # fmt: skip
        page.add_figure(name, title, figure, f"Shaded: pointwise 95 % intervals. Area under the curve: {words}.")


def _marked(names: Sequence[str], one: Evaluated, options: ReportOptions) -> dict[str, dict[str, tuple[float, float]]]:
    """Where the operating points lie on the curves of a split: 1 - specificity, sensitivity."""
    marked: dict[str, dict[str, tuple[float, float]]] = {}
    for target, points in options.points.items():
        scores, truth = _columns(one, target, names)
        known = ~np.isnan(truth)
        for point, threshold in points.items():
            sensitivity, specificity = decision_figures(scores[known], truth[known], threshold)[:2]
            if not np.isnan([sensitivity, specificity]).any():
                marked.setdefault(target, {})[point] = (1 - specificity, sensitivity)
    return marked


def _add_points(page: _Page, names: Sequence[str], splits: Sequence[Evaluated], options: ReportOptions) -> None:
    rows = []
    for one in splits:
        for target, points in _marked(names, one, options).items():
            rows += [
                [f"{target}: {point}", one.name, f"{options.points[target][point]:.3f}", f"{y:.3f}", f"{1 - x:.3f}"]
                for point, (x, y) in points.items()
            ]
    if rows:
        page.add_table("Operating points", ("point", "split", "threshold", "sensitivity", "specificity"), rows)


def _add_calibration(page: _Page, names: Sequence[str], splits: Sequence[Evaluated], options: ReportOptions) -> None:
    panels = {}
    for one in splits:
        for target in _targets(names, options) if options.multi_label or len(names) == 2 else ["most probable class"]:
            if target == "most probable class":
                truths = np.nan_to_num(one.targets).argmax(axis=1)
                scores, truth = (
                    one.probabilities.max(axis=1),
                    (one.probabilities.argmax(axis=1) == truths).astype(float),
                )
            else:
                scores, truth = _columns(one, target, names)
            if not np.isnan(truth).all():
                panels[f"{target}, {one.name}"] = reliability(scores, truth)
    page.results["calibration"] = {
        title: {"ece": found.error, "confidence": found.confidence, "observed": found.observed, "images": found.counts}
        for title, found in panels.items()
    }
    words = "; ".join(f"{title}: {found.error:.3f}" for title, found in panels.items())
    page.add_figure("reliability", "Calibration", draw_reliability(panels),
                    f"Points on the dotted line are calibrated. Expected calibration error: {words}.")  # fmt: skip


def _add_confusion(page: _Page, names: Sequence[str], splits: Sequence[Evaluated], options: ReportOptions) -> None:
    panels: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    for one in splits:
        if not options.multi_label:
            truths, said = np.nan_to_num(one.targets).argmax(axis=1), one.probabilities.argmax(axis=1)
            panels[one.name] = (confusion(truths, said, len(names)), names)
            continue
        for number, name in enumerate(names):
            known = ~np.isnan(one.targets[:, number])
            if known.any():
                said = one.probabilities[known, number] >= 0.5
                counts = confusion(one.targets[known, number].astype(int), said.astype(int), 2)
                panels[f"{name}, {one.name}"] = (counts, ("absent", "present"))
    page.results["confusion"] = {title: counts for title, (counts, _) in panels.items()}
    words = "at a probability of 0.5" if options.multi_label else "of the most probable class"
    page.add_figure("confusion", "Confusion", draw_confusion(panels),
                    f"Counts {words}, and their share of the true class (row).")  # fmt: skip


def worst_cases(
    one: Evaluated, names: Sequence[str], multi_label: bool, count: int = WORST
) -> list[tuple[int, str, str, float]]:
    """The most confident errors, the worst first.

    Args:
        one: A split.
        names: Of the classes.
        multi_label: Then an error is a label whose probability is on the wrong side of 0.5, and its confidence the
            probability of what is wrong; else it is a most probable class that is wrong, and its probability.
        count: How many at most; an image is listed once.

    Returns:
        Row, what is true, what was said, and the confidence, 0 .. 1.
    """
    probabilities, targets = np.asarray(one.probabilities), np.asarray(one.targets)
    if multi_label:
        gap = np.abs(np.where(np.isnan(targets), probabilities, targets) - probabilities)
        column, confidence = gap.argmax(axis=1), gap.max(axis=1)
        wrong = confidence > 0.5
    else:
        column, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        wrong = column != np.nan_to_num(targets).argmax(axis=1)
    rows = sorted(np.flatnonzero(wrong), key=lambda row: -confidence[row])[:count]
    found = []
    for row in rows:
        name = names[column[row]]
        if multi_label:
            true, said = (name, f"no {name}") if targets[row, column[row]] == 1 else (f"no {name}", name)
        else:
            true, said = names[int(np.nan_to_num(targets[row]).argmax())], name
        found.append((int(row), true, said, float(confidence[row])))
    return found


def _add_worst(
    page: _Page,
    names: Sequence[str],
    splits: Sequence[Evaluated],
    options: ReportOptions,
    images: Callable[[str, int], np.ndarray],
) -> None:
    for one in splits:
        cases = worst_cases(one, names, options.multi_label, options.worst)
        page.results.setdefault("worst", {})[one.name] = [
            {"id": one.ids[row], "true": true, "said": said, "confidence": confidence}
            for row, true, said, confidence in cases
        ]
        if not cases:
            continue
        tiles = [
            (
                images(one.name, row),
                f"{_short(one.ids[row])}\ntrue: {_short(true)}\nsaid: {_short(said)}, {confidence:.2f}",
            )
            for row, true, said, confidence in cases
        ]
        page.add_figure(
            "worst_" + "".join(letter if letter.isalnum() else "_" for letter in one.name),
            f"Most confident errors: {one.name}",
            draw_contact_sheet(tiles),
            f"The {len(cases)} errors of {one.name} that the model was surest of.",
        )


def _short(text: str, length: int = 30) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 2]} ... {text[2 - length // 2 :]}"
