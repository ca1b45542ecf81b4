"""Report of a training run in Markdown, and the model card to fill in."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from spcxr_hf.files import RESEARCH_NOTICE, atomic_file, software_versions


def write_report(
    folder: Path,
    title: str,
    figures: Mapping[str, Any],
    recipe: Mapping[str, Any],
    pictures: Sequence[str] = (),
) -> Path:
    """Write `folder/report.md`.

    Args:
        figures: Results by name, in order.
        recipe: The resolved command line; paths are left out, since they may identify people and machines.
        pictures: Names of PNG files in the folder; missing ones are left out.
    """
    lines = [f"# {title}", "", *_table(("figure", "value"), figures), ""]
    lines += [f"![{Path(name).stem}]({name})\n" for name in pictures if (folder / name).is_file()]
    places = ("data", "output", "cache_folder", "init_from")
    settings = {name: value for name, value in recipe.items() if name not in places and value not in (None, [])}
    lines += ["## Recipe", "", *_table(("setting", "value"), settings), "", f"Software: {software_versions()}.", ""]
    path = folder / "report.md"
    with atomic_file(path) as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_cost(folders: Sequence[str]) -> dict[str, Any] | None:
    """The cost of the runs in these folders together, from their `report.md`; None if one has not ended, or for none.

    Returns:
        "device", "minutes", "images" (views), "images_per_second" and "processes".
    """
    minutes = images = 0.0
    figures: dict[str, str] = {}
    for folder in folders:
        page = Path(folder) / "report.md"
        if not page.is_file():
            return None
        figures = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE))
        minutes += float(figures["seconds"]) / 60
        images += int(figures["optimiser steps"]) * int(figures["images per step"])
    if not figures:
        return None
    rate = images / (60 * minutes) if minutes else 0.0
    counts = {"minutes": round(minutes, 2), "images": int(images), "images_per_second": round(rate, 2)}
    processes = int(figures["processes"].partition(",")[0])  # "8, sharded"
    return {"device": figures["device"], "processes": processes, **counts}


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [
        f"| {header[0]} | {header[1]} |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()),
    ]


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    # Labels come from files: neither HTML nor a link or a picture of Markdown may be made of them.
    return re.sub(r"([\\|]|(?<=\])\()", r"\\\1", html.escape(text, quote=False)).replace("\n", " ")


def write_card(
    folder: Path, pipeline_tag: str, base_model: str | None, figures: Mapping[str, Any], images: Mapping[str, int]
) -> None:
    """Write a model card to fill in, `folder/README.md`: front matter, figures, population, thresholds.

    `spcxr publish` refuses it until a licence is in its front matter. `figures` are those on val, `images` their number
    by split or class; a Hub id of the `base_model` goes into the front matter, a local folder does not.
    """
    is_id = base_model is not None and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if is_id else None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["chest-x-ray", "medical-imaging", "radiology", "vit"],
    )
    values = {name: value for name, value in figures.items() if value is not None}
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# FILL IN: name\n\nFILL IN: what the model answers, about which images. {RESEARCH_NOTICE.capitalize()}.",
        f"Base model: {base_model if is_id else 'FILL IN' if base_model else 'none, random weights'}.",
        "## Population\n\nFILL IN: hospitals, years, ages, sexes, views, scanners, how the labels were made.",
        "\n".join(_table(("trained and chosen on", "images"), images)),
        "## Figures\n\nOn val, where the model was chosen, which is optimistic. FILL IN those on held-out images with "
        "their intervals (`training_scripts/evaluate.py`).",
        "\n".join(_table(("figure on val", "value"), values)) if values else "None.",
        "## Thresholds\n\nNone are set. FILL IN the operating points (`training_scripts/calibrate.py`), or that the "
        "probabilities are not calibrated.",
        "## Limits\n\nFILL IN: who it must not be used for, where it fails.",
        "## Licence\n\nFILL IN here, and `license:` in the front matter; those of the images and the base model bind.",
    ]
    with atomic_file(folder / "README.md") as partial:
        partial.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
