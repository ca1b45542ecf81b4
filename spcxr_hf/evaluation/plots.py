"""Figures of a report, for screen, print and colour-blind readers.

Colours are Okabe and Ito's (Color Universal Design, 2008), in an order in which neighbours differ in brightness too;
every line also has its own style and marker, every word is at least 8 points. Each function takes numbers and
returns a matplotlib figure; `save_figure` writes it. The contact sheet shows radiographs: it belongs
on the user's disk, not into a repository.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from spcxr_hf.errors import SpcxrError, needs
from spcxr_hf.evaluation.curves import Curve, Reliability
from spcxr_hf.files import RESEARCH_NOTICE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How one line is drawn."""

    colour: str
    line: str
    marker: str


STYLES = (
    Style("#000000", "-", "o"),
    Style("#009E73", "--", "s"),
    Style("#0072B2", "-.", "^"),
    Style("#CC79A7", ":", "D"),
    Style("#D55E00", (0, (5, 1, 1, 1, 1, 1)), "v"),  # type: ignore[arg-type]
)
BASE = "#707070"  # of chance and perfect calibration
FONT_SIZE = 9  # points; nothing is smaller than 8
DOTS_PER_INCH = 150
MOST_COLUMNS = 3
PANEL = 3.0  # inches


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; its folders are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(figure))
    except OSError as error:
        raise SpcxrError(f"{path}: the figure could not be written ({error})") from error
    return path


def to_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None, "Comment": RESEARCH_NOTICE})
    return stream.getvalue()


# ---- curves --------------------------------------------------------------------------------------------------------


def draw_roc(
    panels: Mapping[str, Mapping[str, Curve]],
    points: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Receiver operating characteristics with their 95 % bands.

    Args:
        panels: Title (the target) -> name (the split, the model) -> its curve.
        points: Title -> name of an operating point -> (1 - specificity, sensitivity), marked on that panel.
    """
    return _draw_curves(panels, points or {}, "1 - specificity", "sensitivity", "AUROC", "lower right")


def draw_precision_recall(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Precision over recall with 95 % bands; the grey line is the share of positives, what chance gives.

    Args:
        panels: Title (the target) -> name (the split, the model) -> its curve.
    """
    return _draw_curves(panels, {}, "recall (sensitivity)", "precision", "AP", "lower left")


def _draw_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    points: Mapping[str, Mapping[str, tuple[float, float]]],
    x_label: str,
    y_label: str,
    area: str,
    place: Any,
) -> Figure:
    figure, grid = panel_grid(list(panels), extra_height=0.0)
    for (title, curves), axes in zip(panels.items(), grid, strict=True):
        for style, (name, curve) in zip(styles(len(curves)), curves.items(), strict=True):
            low, high = curve.interval
            label = f"{name}: {area} {curve.area:.3f}\n[{low:.3f}, {high:.3f}]"
            axes.fill_between(curve.grid, curve.low, curve.high, color=style.colour, alpha=0.15, linewidth=0)
            axes.plot(
                curve.x,
                curve.y,
                color=style.colour,
                linestyle=style.line,
                linewidth=1.6,
                label=label,
                drawstyle="steps-pre" if area == "AP" else "default",
            )  # precision does not interpolate
            if area == "AP":
                axes.axhline(curve.base, color=BASE, linestyle=(0, (1, 2)), linewidth=1)
        if area == "AUROC":
            axes.plot([0, 1], [0, 1], color=BASE, linestyle=(0, (1, 2)), linewidth=1)
        for marker, (name, point) in zip("*PX^sD", points.get(title, {}).items(), strict=False):
            axes.plot(*point, marker=marker, markersize=9, color="#E69F00", markeredgecolor="black", linestyle="none",
                      label=name)  # fmt: skip
        _unit_square(axes, x_label, y_label)
        # Low precision curves would cross the legend in its usual place.
        low_down = area == "AP" and max(curve.area for curve in curves.values()) < 0.5
        axes.legend(loc="upper right" if low_down else place, fontsize=8, framealpha=0.85, handlelength=2.4)
    return figure


def draw_reliability(panels: Mapping[str, Reliability]) -> Figure:
    """Reliability diagrams: what came true over what was predicted, with 95 % intervals, and how many rows there are.

    Args:
        panels: Title -> its diagram.
    """
    figure, grid = panel_grid(list(panels), extra_height=0.6)
    for (title, found), axes in zip(panels.items(), grid, strict=True):
        axes.plot([0, 1], [0, 1], color=BASE, linestyle=(0, (1, 2)), linewidth=1, label="perfect")
        errors = np.clip([found.observed - found.low, found.high - found.observed], 0, 1)
        axes.bar(found.confidence, found.counts / found.counts.sum(), width=0.03, color="#56B4E9", edgecolor="black",
                 linewidth=0.4, label="share of the images")  # fmt: skip
        axes.errorbar(found.confidence, found.observed, yerr=errors, color="black", marker="o", markersize=4,
                      linewidth=1.4, elinewidth=1, capsize=2.5, label="observed, 95 %")  # fmt: skip
        axes.set_title(f"{title}\nECE {found.error:.3f}, {found.counts.sum()} images", fontsize=FONT_SIZE)
        _unit_square(axes, "predicted probability", "observed share")
        # Under the panel, where it hides no point.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8, frameon=False, ncols=1)
    return figure


def draw_confusion(panels: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> Figure:
    """Confusion matrices: counts, and the share of the true class, which the shade shows.

    Args:
        panels: Title -> counts (classes, classes), rows the true class, and the classes' names.
    """
    largest = max((len(names) for _, names in panels.values()), default=1)
    figure, grid = panel_grid(list(panels), side=max(PANEL, 0.75 * largest + 1.2), extra_height=-0.2)
    for (_, (counts, names)), axes in zip(panels.items(), grid, strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", fontsize=FONT_SIZE,
                      color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip
        labels = [_wrapped(name, 14) for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8, rotation=0 if len(names) < 4 else 45,
                        ha="center" if len(names) < 4 else "right", rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        if len(names) < 4:
            for label in axes.get_xticklabels():
                label.set_verticalalignment("top")
        axes.set_xlabel("predicted", fontsize=FONT_SIZE)
        axes.set_ylabel("true", fontsize=FONT_SIZE)
    return figure


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_contact_sheet(tiles: Sequence[tuple[np.ndarray, str]], columns: int = 4, title: str = "") -> Figure:
    """Pictures with a few words under each.

    Args:
        tiles: (H, W) grey or (H, W, 3) colour, 0 .. 1, of any sizes, and the words, at most three short lines.
        columns: Number of pictures in a row.
        title: Over the sheet.
    """
    if not tiles:
        raise SpcxrError("a contact sheet needs at least one picture")
    lines = max(words.count("\n") + 1 for _, words in tiles)
    tallest = max(np.shape(picture)[0] / np.shape(picture)[1] for picture, _ in tiles)
    height = 2.2 * (tallest - 1) + 0.19 * lines  # beyond a square of 2.2 inches
    figure, grid = panel_grid([""] * len(tiles), side=2.2, columns=columns, extra_height=height)
    for axes, (picture, words) in zip(grid, tiles, strict=True):
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(words, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=FONT_SIZE + 1)
    return figure


def grey_picture(image: Image.Image, side: int = 256) -> np.ndarray:
    """A radiograph of 8 or 16 bits as grey values 0 .. 1, (H, W) float32, its longer side at most `side` pixels."""
    white = 255 if image.mode == "L" else 65535
    values = Image.fromarray(np.asarray(image, dtype=np.float32) / white)
    values.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.asarray(values).clip(0, 1)


# ---- common --------------------------------------------------------------------------------------------------------


def panel_grid(
    titles: Sequence[str], side: float = PANEL, columns: int = MOST_COLUMNS, extra_height: float = 0.3
) -> tuple[Figure, list[Axes]]:
    """A figure with one square panel for each title; places of the last row that are left over stay empty."""
    if not titles:
        raise SpcxrError("a figure needs at least one panel")
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    with needs("demo", "matplotlib"):
        from matplotlib.figure import Figure  # a figure of its own touches no global state
    figure = Figure(figsize=(side * columns, (side + extra_height) * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(_wrapped(title, 34), fontsize=FONT_SIZE)
    return figure, grid[: len(titles)]


def styles(count: int) -> list[Style]:
    """The styles of so many lines."""
    if count > len(STYLES):
        raise SpcxrError(f"a panel takes at most {len(STYLES)} lines; got {count}")
    return list(STYLES[:count])


def _unit_square(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel(x_label, fontsize=FONT_SIZE)
    axes.set_ylabel(y_label, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text
