"""A set of radiographs as a page to look at: what is in it, what is missing, what is broken, what is there twice.

audit -> _survey (each image is decoded once) -> find_duplicates -> _numbers (audit.json) -> _page (audit.html)

The page is one file without links or scripts. It shows pixels, ids and columns of the table; of a DICOM header nothing
is read but what decoding needs, and nothing of that is written.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf.data.table import OnError, RadiographTable, open_image
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, atomic_file, worker_count, write_json
from spcxr_hf.quality.duplicates import (
    THUMBNAIL,
    Pair,
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
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th, td { padding: .2rem .7rem; text-align: left; }
th { background: #eef; } td { border-bottom: 1px solid #ddd; } img { image-rendering: auto; max-width: 100%; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1rem; } .sheet { background: #000; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 0 1.5rem; }
.pairs figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
"""


@dataclass
class _Survey:
    """What one pass over the images finds; a broken image has None for its size and mode.

    Attributes:
        tiles: (n, 96, 96) uint8 for contact sheets.
        thumbnails: (n, 64, 64) uint8 for fingerprints.
        sizes: Width and height of each image.
        modes: How each file keeps its pixels.
        histograms: (n, 256) share of each grey value.
        broken: Row -> cause.
    """

    tiles: np.ndarray
    thumbnails: np.ndarray
    sizes: list[tuple[int, int] | None]
    modes: list[str | None]
    histograms: np.ndarray
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

    Returns:
        What `audit.json` holds.

    Raises:
        SpcxrError: the set is empty, there is no such column, an image is broken (with "stop"), or the folder cannot be
            written to.
    """
    if not len(table):
        raise SpcxrError(f"{table.name}: no rows to audit")
    if on_error not in get_args(OnError):
        raise SpcxrError(f"on_error must be {' or '.join(get_args(OnError))}; got {on_error!r}")
    labels = [label_columns] if isinstance(label_columns, str) else list(label_columns)
    splits = _words(table.column(split_column)) if split_column else [None] * len(table)
    columns = {name: _words(table.column(name)) for name in labels}
    folder = Path(output)
    survey = _survey(table, worker_count(workers), on_error)
    pairs = find_duplicates(survey.thumbnails, flips=flips) if images else None
    numbers = _numbers(table, survey, pairs, splits, columns, patient_column) | {"split_column": split_column}
    write_json(folder / "audit.json", numbers)
    with atomic_file(folder / "audit.html") as partial:
        page = _page(numbers, survey, pairs, table.ids, splits, columns)
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


def _survey(table: RadiographTable, workers: int, on_error: OnError) -> _Survey:
    count = len(table)
    survey = _Survey(
        np.zeros((count, TILE, TILE), dtype=np.uint8),
        np.zeros((count, THUMBNAIL, THUMBNAIL), dtype=np.uint8),
        [None] * count,
        [None] * count,
        np.zeros((count, 256), dtype=np.float32),
    )

    def look(row: int) -> None:
        try:
            _look(table, row, survey)
        except SpcxrError as error:
            if on_error == "stop":
                raise
            survey.broken[row] = str(error)

    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(look, range(count)), total=count, desc=f"reading {table.name}", unit="image"):
            pass
    survey.broken = dict(sorted(survey.broken.items()))
    return survey


def _look(table: RadiographTable, row: int, survey: _Survey) -> None:
    cell = table.rows["image"][row].as_py()
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise SpcxrError(f"{table.name}: row {row}: no image in this row")
    image = open_image(cell, f"{table.name}: row {row}")
    survey.thumbnails[row] = thumbnail(image)
    survey.tiles[row] = np.asarray(_fit_square(image))
    survey.histograms[row] = np.bincount(np.asarray(image).ravel(), minlength=256) / (image.width * image.height)
    survey.sizes[row] = image.size
    survey.modes[row] = _mode_of(cell)


def _fit_square(grey: Image.Image) -> Image.Image:
    """The picture in its own shape on a black square."""
    scale = TILE / max(grey.size)
    size = [max(1, round(side * scale)) for side in grey.size]
    tile = Image.new("L", (TILE, TILE))
    tile.paste(
        grey.resize((size[0], size[1]), Image.Resampling.BILINEAR), ((TILE - size[0]) // 2, (TILE - size[1]) // 2)
    )
    return tile


def _mode_of(cell: Mapping[str, Any]) -> str:
    """Format and Pillow's mode of a file that could be read, from its first bytes."""
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as picture:
            return f"{picture.format} {picture.mode}"
    except (OSError, ValueError, SyntaxError):
        return "DICOM"  # the one kind that is read otherwise


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
    told = None if pairs is None else [_describe_pair(pair, ids, splits) for pair in pairs]
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
        "grey": _grey_by_split(survey, splits),
        "broken": [{"id": ids[row], "cause": cause} for row, cause in survey.broken.items()],
        "duplicates": told,
        "leaks": {
            "patients": [{"patient": leak.patient, "ids": leak.ids} for leak in leaks],
            "images": None if told is None else [pair for pair in told if _crosses(pair)],
        },
    }


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
    told = ["(none)" if split is None else split for split in splits]
    counts = Counter(zip(["(missing)" if value is None else value for value in values], told, strict=True))
    names = list(dict.fromkeys(told))
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
    ids: Sequence[str],
    splits: Sequence[str | None],
    columns: Mapping[str, Sequence[str | None]],
) -> str:
    title = f"Audit of {_escape(numbers['set'])}"
    sides = [_side(split, numbers["split_column"]) for split in splits]
    parts = [
        *_overview(numbers),
        *_label_tables(numbers),
        *_troubles(numbers),
        *_duplicates(numbers, survey, pairs),
        "<h2>Grey values</h2>",
        _histogram_figure({_side(name, numbers["split_column"]): values for name, values in numbers["grey"].items()}),
        *_contact_sheets(survey, sides, columns),
        f"<footer>{RESEARCH_NOTICE.capitalize()}.</footer>",
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n'


def _side(split: str | None, column: str | None) -> str:
    """What the page calls a split: `train`, but `pretrain = True`."""
    if split in (None, "(none)", "(missing)"):
        return "no split"
    return str(split) if column == "split" else f"{column} = {split}"


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table, every cell escaped."""
    top = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in rows)
    return f"<table><tr>{top}</tr>\n{body}</table>"


def _cell(value: Any) -> str:
    if not isinstance(value, int | float):
        return f"<td>{_escape(value)}</td>"
    return f'<td class="number">{int(value) if value == int(value) else value:,}</td>'


def _overview(numbers: Mapping[str, Any]) -> list[str]:
    leaks = numbers["leaks"]
    not_looked_for = "not looked for"
    rows = [
        ("images", numbers["images"]),
        ("readable", numbers["readable"]),
        ("broken", len(numbers["broken"])),
        ("patients", numbers["patients"]),
        ("images without a patient", numbers["images_without_patient"]),
        ("pairs of nearly equal images", _length(numbers["duplicates"], not_looked_for)),
        ("of these on different sides of the split", _length(leaks["images"], not_looked_for)),
        ("patients on different sides of the split", len(leaks["patients"])),
    ]
    sizes = [(name, *numbers[name].values()) for name in ("width", "height") if numbers[name]]
    return [
        _table(("", "number"), rows),
        "<h2>Splits</h2>",
        _table((numbers["split_column"] or "split", "images"), numbers["splits"].items()),
        "<h2>Files</h2>",
        _table(("kind and mode", "images"), numbers["modes"].items()),
        _table(("pixels", "smallest", "median", "largest"), sizes),
        _table(("most frequent size", "images"), list(numbers["sizes"].items())[:10]),
    ]


def _length(found: Sequence | None, otherwise: str) -> Any:
    return otherwise if found is None else len(found)


def _label_tables(numbers: Mapping[str, Any]) -> list[str]:
    parts = ["<h2>Labels</h2>"] if numbers["labels"] else []
    for name, counts in numbers["labels"].items():
        splits = list(next(iter(counts.values())))
        rows = [(label, *by_split.values(), sum(by_split.values())) for label, by_split in counts.items()]
        splits = [_side(split, numbers["split_column"]) for split in splits]
        parts += [_table((name, *splits, "all"), rows[:SHOWN]), _more(rows, SHOWN)]
    return parts


def _more(rows: Sequence, shown: int) -> str:
    return f"<p>{len(rows) - shown} more are in audit.json.</p>" if len(rows) > shown else ""


def _troubles(numbers: Mapping[str, Any]) -> list[str]:
    """Missing values, broken files, leaking patients."""
    broken, patients = numbers["broken"], numbers["leaks"]["patients"]
    parts = ["<h2>Missing values</h2>", _table(("column", "rows without a value"), numbers["missing"].items())]
    if broken:
        causes = [(one["id"], one["cause"]) for one in broken[:SHOWN]]
        parts += ["<h2>Broken images</h2>", _table(("image", "cause"), causes), _more(broken, SHOWN)]
    if patients:
        places = [(one["patient"], *_places(one["ids"])) for one in patients[:SHOWN]]
        parts += ["<h2>Patients on several sides</h2>", _table(("patient", "splits", "images"), places)]
        parts.append(_more(patients, SHOWN))
    return parts


def _places(ids: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    return ", ".join(ids), "; ".join(", ".join(names) for names in ids.values())


def _duplicates(numbers: Mapping[str, Any], survey: _Survey, pairs: Sequence[Pair] | None) -> list[str]:
    """Pairs side by side, those across splits first."""
    if not pairs:
        return []
    told = sorted(zip(numbers["duplicates"], pairs, strict=True), key=lambda item: not _crosses(item[0]))
    parts = ["<h2>Nearly equal images</h2>", '<div class="pairs">']
    for words, pair in told[:SHOWN_PAIRS]:
        picture = np.concatenate([survey.tiles[pair.first], survey.tiles[pair.second]], axis=1)
        sides = [_side(words[f"{one}_split"], numbers["split_column"]) for one in ("first", "second")]
        where = [f"{words[one]} ({side})" for one, side in zip(("first", "second"), sides, strict=True)]
        leak = ": a leak" if _crosses(words) else ""
        parts.append(_figure(picture, f"{' and '.join(where)}, correlation {words['correlation']:.2f}{leak}"))
    return [*parts, "</div>", _more(told, SHOWN_PAIRS)]


def _contact_sheets(survey: _Survey, splits: Sequence[str], columns: Mapping[str, Sequence[str | None]]) -> list[str]:
    """A sheet for each split, and for each class of each label column in it."""
    parts = ["<h2>Contact sheets</h2>"]
    for title, rows in _sheets(splits, columns):
        readable = [row for row in rows if row not in survey.broken]
        if readable:
            spread = np.linspace(0, len(readable) - 1, min(TILES, len(readable))).round().astype(int)
            chosen = [readable[place] for place in spread]
            parts.append(_figure(np.concatenate(list(survey.tiles[chosen]), axis=1), f"{title}: {len(rows)} images"))
    return parts


def _sheets(splits: Sequence[str], columns: Mapping[str, Sequence[str | None]]) -> list[tuple[str, list[int]]]:
    """Titles and row numbers; by split alone where there are no labels to show."""
    shown = {name: values for name, values in columns.items() if len(set(values)) <= MAX_CLASSES}
    groups: dict[str, list[int]] = {}
    for row, split in enumerate(splits):
        for name, values in shown.items():
            if values[row] is not None:
                groups.setdefault(f"{name} = {values[row]}, {split}", []).append(row)
        if not shown:
            groups.setdefault(split, []).append(row)
    return sorted(groups.items())


def _figure(pixels: np.ndarray, caption: str) -> str:
    """A grey picture (H, W) uint8 inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _embed(buffer.getvalue(), caption, "sheet")


def _embed(png: bytes, caption: str, style: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = _escape(caption)
    return (
        f'<figure><img class="{style}" alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _histogram_figure(grey: Mapping[str, Mapping[str, Any]]) -> str:
    """Moments of all splits, and their histograms where matplotlib (the extra `demo`) is installed."""
    moments = _table(("split", "mean", "standard deviation"), [(name, g["mean"], g["std"]) for name, g in grey.items()])
    try:
        from matplotlib.figure import Figure  # a figure of its own touches no global state
    except ImportError:
        return moments + '<p>Histograms need matplotlib: <code>pip install "spcxr-hf[demo]"</code></p>'
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
    return moments + _embed(buffer.getvalue(), "grey values by split", "plot")
