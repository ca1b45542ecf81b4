"""Audit of a data set as an HTML page: contents, missing values, broken files, duplicates, leaks.

audit -> _survey (each image is decoded once) -> find_duplicates -> _numbers (audit.json) -> _page (audit.html)

The page is one file without links or scripts. It shows pixels, ids and columns of the table; of a DICOM header nothing
is read but what decoding needs, and nothing of that is written.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageOps

from spcxr_hf.data.sets import write_ids
from spcxr_hf.data.table import OnError, RadiographTable, open_with_warnings
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, atomic_file, in_threads, render_page, write_json
from spcxr_hf.images.reader import DICOM_PREFIX, file_kind
from spcxr_hf.quality.duplicates import (
    THUMBNAIL,
    Pair,
    copies_to_leave_out,
    find_duplicates,
    find_patient_leaks,
    known_patients,
    thumbnail,
)

TILE = 96  # pixels of a picture on a contact sheet
TILES = 12  # of each class and split
SHOWN = 50  # rows of a list on the page; audit.json has them all
SHOWN_PAIRS = 24
MAX_CLASSES = 20  # a column with more values is no label: names, dates, ids


@dataclass
class _Survey:
    """Results of one pass over the images; a broken image has None for its size and mode.

    Attributes:
        tiles: (n, 96, 96) uint8 for contact sheets.
        thumbnails: (n, 64, 64) uint8 for fingerprints.
        sizes: Width and height of each image.
        modes: How each file keeps its pixels.
        histograms: (n, 256) share of each grey value.
        warnings: Of each image, as `spcxr_hf.images.plausibility.quality_warnings` words them.
    """

    tiles: np.ndarray
    thumbnails: np.ndarray
    sizes: list[tuple[int, int] | None]
    modes: list[str | None]
    histograms: np.ndarray
    warnings: list[list[str]]
    broken: dict[int, str] = field(default_factory=dict)


# ---- the audit -------------------------------------------------------------------------------------------------


def audit(
    table: RadiographTable,
    output: Path | str,
    *,
    split_column: str | None = None,
    label_columns: str | Sequence[str] = (),
    patient_column: str = "patient",
    images: bool = True,
    flips: bool = False,
    workers: int | None = None,
    on_error: OnError = "skip",
    copies_list: Path | str | None = None,
) -> dict[str, Any]:
    """Write `audit.html`, a page with pictures, and `audit.json`, its numbers, into a folder.

    Args:
        table: The set.
        output: The folder, made where it is missing.
        split_column: Whose values are the splits; without it the set is one split and cannot leak.
        label_columns: Columns to count by split and to draw contact sheets of.
        patient_column: May be missing: all patients are unknown then.
        images: Whether to look for images that are nearly the same (most of the time that an audit takes).
        flips: Compare mirrored images too.
        workers: Threads that decode; by default one for each processor, at most 8.
        on_error: "skip": a broken image is listed with its cause, however many there are, since an audit is what finds
            them; "stop": the first ends the audit, and nothing is written.
        copies_list: A text file to write: ids of images to leave out (`exclude` of `read_set`, `--exclude` of the
            scripts) so that no image is on two sides of the split; of two copies that in `train` goes first.

    Returns:
        What `audit.json` holds.
    """
    if not len(table):
        raise SpcxrError(f"{table.name}: no rows to audit")
    if on_error not in get_args(OnError):
        raise SpcxrError(f"on_error must be {' or '.join(get_args(OnError))}; got {on_error!r}")
    if copies_list is not None and not (split_column and images):
        raise SpcxrError("a list of copies needs a column of splits, and images that are compared")
    labels = [label_columns] if isinstance(label_columns, str) else list(label_columns)
    splits = _words(table.column(split_column)) if split_column else [None] * len(table)
    columns = {name: _words(table.column(name)) for name in labels}
    folder = Path(output)
    survey = _survey(table, workers, on_error)
    pairs = find_duplicates(survey.thumbnails, flips=flips) if images else None
    numbers = _numbers(table, survey, pairs, splits, columns, patient_column) | {"split_column": split_column}
    write_json(folder / "audit.json", numbers)
    if copies_list is not None:
        pairs_of_ids = [(pair["first"], pair["second"]) for pair in numbers["leaks"]["images"]]
        copies = copies_to_leave_out(pairs_of_ids, dict(zip(table.ids, splits, strict=True)))
        write_ids(copies_list, sorted(copies), f"{len(copies)} copies of images on a later side of {split_column}")
    with atomic_file(folder / "audit.html") as partial:
        page = _page(numbers, survey, pairs, splits, columns)
        partial.write_text(page, encoding="utf-8", errors="replace")
    return numbers


def _words(values: Iterable[Any]) -> list[str | None]:
    """Cells as words: None where a value is missing, the entries of a list joined."""
    return [None if _is_missing(value) else _word(value) for value in values]


def _word(value: Any) -> str:
    return (", ".join(sorted(map(str, value))) or "(empty list)") if isinstance(value, list) else str(value)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


# ---- one pass over the images ----------------------------------------------------------------------------------


def _survey(table: RadiographTable, workers: int | None, on_error: OnError) -> _Survey:
    count = len(table)
    survey = _Survey(
        np.zeros((count, TILE, TILE), dtype=np.uint8),
        np.zeros((count, THUMBNAIL, THUMBNAIL), dtype=np.uint8),
        [None] * count,
        [None] * count,
        np.zeros((count, 256), dtype=np.float32),
        [[] for _ in range(count)],
    )

    def look(row: int) -> None:
        cell, name = table.rows["image"][row].as_py(), f"{table.name}: row {row}"
        try:
            image, survey.warnings[row] = open_with_warnings(cell, name)
        except SpcxrError as error:
            if on_error == "stop":
                raise
            survey.broken[row] = str(error)
            return
        survey.thumbnails[row] = thumbnail(image)
        survey.tiles[row] = np.asarray(ImageOps.pad(image, (TILE, TILE), Image.Resampling.BILINEAR))
        survey.histograms[row] = np.bincount(np.asarray(image).ravel(), minlength=256) / (image.width * image.height)
        survey.sizes[row] = image.size
        survey.modes[row] = _mode_of(cell)

    in_threads(look, range(count), f"reading {table.name}", workers)
    survey.broken = dict(sorted(survey.broken.items()))
    return survey


def _mode_of(cell: Mapping[str, Any]) -> str:
    """Format and Pillow's mode of a file that could be read, from its first bytes."""
    with io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb") as file:
        kind = file_kind(file.read(DICOM_PREFIX.stop), cell["path"] or "")
        if kind == "DICOM":  # whose preamble can be the header of a TIFF
            return kind
        file.seek(0)
        with Image.open(file) as picture:
            return f"{picture.format} {picture.mode}"


# ---- numbers ---------------------------------------------------------------------------------------------------


def _numbers(
    table: RadiographTable,
    survey: _Survey,
    pairs: Sequence[Pair] | None,
    splits: Sequence[str | None],
    columns: Mapping[str, Sequence[str | None]],
    patient_column: str,
) -> dict[str, Any]:
    ids, patients = table.ids, known_patients(table, patient_column)
    described = None if pairs is None else [_describe_pair(pair, ids, splits) for pair in pairs]
    leaks = find_patient_leaks(patients, splits, ids)
    return {
        "set": table.name,
        "images": len(table),
        "readable": len(table) - len(survey.broken),
        "patients": len(set(patients) - {None}),
        "images_without_patient": patients.count(None),
        "splits": _count(splits),
        "labels": {name: _by_split(values, splits) for name, values in columns.items()},
        "missing": {name: _missing(table, name) for name in table.rows.column_names},
        "sizes": _count("x".join(map(str, size)) for size in survey.sizes if size),
        "width": _spread([size[0] for size in survey.sizes if size]),
        "height": _spread([size[1] for size in survey.sizes if size]),
        "modes": _count(mode for mode in survey.modes if mode),
        "warnings": _warnings(survey, ids),
        "grey": _grey_by_split(survey, splits),
        "broken": [{"id": ids[row], "cause": cause} for row, cause in survey.broken.items()],
        "duplicates": described,
        "leaks": {
            "patients": [{"patient": leak.patient, "ids": leak.ids} for leak in leaks],
            "images": None if described is None else [pair for pair in described if _crosses(pair)],
        },
    }


def _warnings(survey: _Survey, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Warning -> number of images, and the first of them; figures of a single image are left out."""
    rows: dict[str, list[int]] = {}
    for row, texts in enumerate(survey.warnings):
        for text in texts:
            rows.setdefault(text.partition(":")[0], []).append(row)
    return {text: {"images": len(found), "first": ids[found[0]]} for text, found in rows.items()}


def _describe_pair(pair: Pair, ids: Sequence[str], splits: Sequence[str | None]) -> dict[str, Any]:
    first, second, similarity, flipped = pair
    return {
        "first": ids[first],
        "first_split": splits[first],
        "second": ids[second],
        "second_split": splits[second],
        "correlation": round(similarity, 4),
        "mirrored": flipped,
    }


def _crosses(pair: Mapping[str, Any]) -> bool:
    """Whether the two images are in different splits; an image in none is on no side."""
    return None not in (pair["first_split"], pair["second_split"]) and pair["first_split"] != pair["second_split"]


def _count(values: Iterable[str | None]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    found = Counter("(missing)" if value is None else value for value in values)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _by_split(values: Sequence[str | None], splits: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Label -> split -> images."""
    shown = ["(none)" if split is None else split for split in splits]
    counts = Counter(zip(["(missing)" if value is None else value for value in values], shown, strict=True))
    names = list(dict.fromkeys(shown))
    return {label: {split: counts[label, split] for split in names} for label in _count(values)}


def _missing(table: RadiographTable, name: str) -> int:
    """Rows without a value; an image is missing where it has neither bytes nor a path."""
    column = table.rows[name]
    if name == "image" or column.null_count == len(column):
        return column.null_count  # the bytes of images are looked at one by one, not all at once
    if str(column.type).startswith("struct"):
        return column.null_count
    return sum(_is_missing(value) for value in column.to_pylist())


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"smallest": min(values), "median": float(np.median(values)), "largest": max(values)}


def _grey_by_split(survey: _Survey, splits: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (0 .. 1) and histogram (256 shares) of the grey values of each split."""
    readable = np.array([size is not None for size in survey.sizes])
    names = np.array(["(none)" if split is None else split for split in splits])
    levels, found = np.arange(256) / 255, {}
    for name in dict.fromkeys(names.tolist()):
        rows = readable & (names == name)
        if rows.any():
            shares = survey.histograms[rows].mean(axis=0, dtype=np.float64)
            mean = float(shares @ levels)
            std = math.sqrt(max(float(shares @ (levels - mean) ** 2), 0))
            histogram = [round(share, 6) for share in shares.tolist()]
            found[name] = {"mean": round(mean, 4), "std": round(std, 4), "histogram": histogram}
    return found


# ---- the page --------------------------------------------------------------------------------------------------


def _page(
    numbers: Mapping[str, Any],
    survey: _Survey,
    pairs: Sequence[Pair] | None,
    splits: Sequence[str | None],
    columns: Mapping[str, Sequence[str | None]],
) -> str:
    """`templates/audit.html` with the numbers and the pictures."""
    column = numbers["split_column"]
    grey = {_side(name, column): values for name, values in numbers["grey"].items()}
    return render_page(
        "spcxr_hf.quality",
        "audit.html",
        **numbers,
        notice=RESEARCH_NOTICE.capitalize(),
        shown=SHOWN,
        sides=[(name, *numbers[name].values()) for name in ("width", "height") if numbers[name]],
        label_tables=[
            (
                name,
                [_side(split, column) for split in next(iter(counts.values()))],
                [(label, *by_split.values(), sum(by_split.values())) for label, by_split in counts.items()],
            )
            for name, counts in numbers["labels"].items()
        ],
        warning_rows=[(text, one["images"], one["first"]) for text, one in numbers["warnings"].items()],
        broken_rows=[(one["id"], one["cause"]) for one in numbers["broken"]],
        patient_rows=[
            (one["patient"], ", ".join(one["ids"]), "; ".join(", ".join(ids) for ids in one["ids"].values()))
            for one in numbers["leaks"]["patients"]
        ],
        pair_figures=_pair_figures(numbers, survey, pairs or ()),
        grey_rows=[(name, values["mean"], values["std"]) for name, values in grey.items()],
        histogram=_histogram(grey),
        sheets=_contact_sheets(survey, [_side(split, column) for split in splits], columns),
    )


def _side(split: str | None, column: str | None) -> str:
    """What the page calls a split: `train`, but `pretrain = True`."""
    if split in (None, "(none)", "(missing)"):
        return "no split"
    return str(split) if column == "split" else f"{column} = {split}"


def _pair_figures(numbers: Mapping[str, Any], survey: _Survey, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Nearly equal images side by side, those across splits first: (PNG in base64, caption)."""
    found = []
    described = zip(numbers["duplicates"] or (), pairs, strict=True)
    for words, pair in sorted(described, key=lambda item: not _crosses(item[0]))[:SHOWN_PAIRS]:
        where = [
            f"{words[one]} ({_side(words[f'{one}_split'], numbers['split_column'])})" for one in ("first", "second")
        ]
        leak = ": a leak" if _crosses(words) else ""
        caption = f"{' and '.join(where)}, correlation {words['correlation']:.2f}{leak}"
        found.append((_png(np.concatenate([survey.tiles[pair.first], survey.tiles[pair.second]], axis=1)), caption))
    return found


def _contact_sheets(
    survey: _Survey, sides: Sequence[str], columns: Mapping[str, Sequence[str | None]]
) -> list[tuple[str, str]]:
    """A sheet for each class of each label column in each split, or for each split: (PNG in base64, caption)."""
    shown = {name: values for name, values in columns.items() if len(set(values)) <= MAX_CLASSES}
    groups: dict[str, list[int]] = {}
    for row, side in enumerate(sides):
        for name, values in shown.items():
            if values[row] is not None:
                groups.setdefault(f"{name} = {values[row]}, {side}", []).append(row)
        if not shown:
            groups.setdefault(side, []).append(row)
    found = []
    for title, rows in sorted(groups.items()):
        readable = [row for row in rows if row not in survey.broken]
        if readable:
            spread = np.linspace(0, len(readable) - 1, min(TILES, len(readable))).round().astype(int)
            tiles = survey.tiles[[readable[place] for place in spread]]
            found.append((_png(np.concatenate(list(tiles), axis=1)), f"{title}: {len(rows)} images"))
    return found


def _png(pixels: np.ndarray) -> str:
    """A grey picture (H, W) uint8 as PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _histogram(grey: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The histograms of all splits as PNG in base64; None where matplotlib (the extra `demo`) is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps global state
    except ImportError:
        return None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in grey.items():
        axes.plot(values["histogram"], label=name.replace("$", r"\$"), linewidth=1)
    axes.set_xlabel("grey value")
    axes.set_ylabel("share of the pixels")
    axes.set_yscale("symlog", linthresh=1e-3)
    if grey:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
