"""Public archives of chest radiographs, read from their published layout into one schema.

    read_archive  -> which archive? -> its reader (`archives_findings`, `archives_classes`) -> Rows (`archive_rows`)
                  -> files that must exist -> RadiographTable

| column | holds |
|---|---|
| `image` | struct of `bytes` and `path`; the encoded file, or where it is |
| `id` | name of the image, unique in the set; in archives `archive/path or name` |
| `patient`, `study` | who and which visit, in archives after the archive's name, as in a union; null: unknown |
| `view` | PA, AP, lateral; null: unknown, or another one |
| `sex`, `age` | F, M; years, to 120; null: unknown |
| `split` | train, val, test: the official split; null: there is none |
| `label` | the one class of the image, where the set is one of classes, in the set's words |
| `labels` | struct, a field per label as `spcxr_hf.data.labels` names it: 1, 0, null (NaN in `label_matrix`) missing |
| `terms` | the findings in the set's own words, before they are mapped |
| `masks` | list of `name` and a file, `path`, or a run-length code, `rle` |
| `boxes` | list of `name`, `x`, `y` (upper left corner), `width`, `height` in pixels of the image |
| `report`, `report_path` | text of the report, or the file that holds it |
| `source` | the archive, and after a slash the origin that it names |
| `licence` | of the archive, or of the image, where the archive names one; to be checked at the source |

Nothing is decoded and no header is read: images are looked for, not opened. What each archive gives, and where a label
is missing rather than absent, is said at its reader.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from spcxr_hf.data.archives.classes import (
    OF_EACH_IMAGE,
    montgomery_masks,
    read_cohen,
    read_covid_radiography,
    read_covidx,
    read_jsrt,
    read_kermany,
    read_tuberculosis,
    shenzhen_masks,
)
from spcxr_hf.data.archives.findings import (
    read_chexpert,
    read_mimic,
    read_nih,
    read_padchest,
    read_rsna,
    read_siim,
    read_vindr,
)
from spcxr_hf.data.archives.rows import Rows
from spcxr_hf.data.labels import LABELS_COLUMN, Uncertain, label_struct
from spcxr_hf.data.manifests import Missing, find_files, radiographs
from spcxr_hf.data.table import PICTURE_SUFFIXES, RadiographTable, scan_pictures
from spcxr_hf.errors import SpcxrError

# ---- archives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """A public archive.

    Attributes:
        title: Its name in full.
        licence: Terms of use, in short.
        markers: Files that identify its folder: patterns, `a|b` for either.
        read: Its folder -> its rows.
        header: Columns of the table that the first marker finds, by which the archive is recognised.
        classes: The only folders of classes there may be -> a pattern that the names of their files begin with.
    """

    title: str
    licence: str
    markers: tuple[str, ...]
    read: Callable[[Path], Rows]
    header: tuple[str, ...] = ()
    classes: Mapping[str, str] | None = None


def read_archive(
    folder: str | os.PathLike,
    name: str | None = None,
    *,
    uncertain: Uncertain = "ignore",
    missing: Missing = "error",
) -> RadiographTable:
    """Read a public archive in its published layout: a row per image, in the order of the archive's tables.

    Args:
        folder: The archive's folder, or the one above.
        name: A key of `ARCHIVES`; None: recognised by its files.
        uncertain: What becomes of labels that are uncertain: `ignore` (missing), `zero`, `one`.
        missing: `error`: every image that the archive's tables name must be there; `skip`: those that are not are left
            out with a warning, as after a partial download.

    Raises:
        SpcxrError: it is none of the archives, or not the named one (the message says what was expected); a table
            cannot be read, lacks a column or names an image twice; or an image is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SpcxrError(f"{root}: no such folder")
    key, place = _find_archive(root, name)
    return _table_of(key, ARCHIVES[key].read(place), uncertain, missing)


def _find_archive(root: Path, name: str | None) -> tuple[str, Path]:
    """The archive in this folder, or the one of this name, and where its tables lie."""
    if name is not None and name not in ARCHIVES:
        raise SpcxrError(f"no archive is called {name!r}; there are {', '.join(ARCHIVES)}")
    found = recognised(root, name)
    if found is None:
        wanted = ARCHIVES if name is None else {name: ARCHIVES[name]}
        expected = "; ".join(f"{key}: {', '.join(archive.markers)}" for key, archive in wanted.items())
        raise SpcxrError(
            f"{root}: {'none of the known archives' if name is None else f'not {name}'}; expected {expected}"
        )
    return found


def recognised(root: Path, name: str | None = None) -> tuple[str, Path] | None:
    """The archive in this folder, or in the one of its subfolders that holds one, and where.

    An archive that is not named is recognised by all of its layout: the header of its table, and its folders of classes
    and no others. In a subfolder it counts if no pictures lie beside it.
    """
    keys = list(ARCHIVES) if name is None else [name]
    children = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))
    found = [
        (key, place)
        for place in (root, *children)
        for key in keys
        if _has_markers(place, ARCHIVES[key].markers) and (name is not None or _is_archive(place, ARCHIVES[key]))
    ]
    # a folder of several archives is none of them; one that is packed twice (Kermany's) is the outer one
    if len({key for key, _ in found}) != 1:
        return None
    key, place = found[0]
    beside = place != root and name is None and any(scan_pictures(child)[0] for child in children if child != place)
    return None if beside else (key, place)


def _has_markers(place: Path, markers: Iterable[str]) -> bool:
    return all(any(any(place.glob(pattern)) for pattern in marker.split("|")) for marker in markers)


def _is_archive(place: Path, archive: Archive) -> bool:
    if archive.header:
        tables = [file for pattern in archive.markers[0].split("|") for file in place.glob(pattern)]
        return any({*archive.header} <= _header(file) for file in tables)
    if archive.classes is None:
        return True
    parents = [place / split for split in ("train", "val", "test") if (place / split).is_dir()] or [place]
    folders = [child for parent in parents for child in parent.iterdir() if child.is_dir()]
    folders = [folder for folder in folders if not folder.name.startswith((".", "__"))]
    if not {folder.name for folder in folders} <= archive.classes.keys():
        return False
    known = []
    for folder in folders:
        inner = folder / "images" if (folder / "images").is_dir() else folder
        names = [file.name for file in inner.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
        known += [bool(re.match(archive.classes[folder.name], name)) for name in names if not name.startswith(".")]
    return 2 * sum(known) >= len(known)


def _header(file: Path) -> set[str]:
    """The columns of a text table, or the words of its first line; none where it cannot be read."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            line = stream.readline(2**16).decode("utf-8-sig")
    except (OSError, EOFError, ValueError):
        return set()
    return {cell.strip() for cell in next(csv.reader([line]), [])} | {f"word {len(line.split())}"}


def _table_of(name: str, rows: Rows, uncertain: Uncertain, missing: Missing) -> RadiographTable:
    if not rows.paths:
        raise SpcxrError(f"{rows.file}: no images of {ARCHIVES[name].title}")
    ids = rows.columns["id"]
    twice = next((own for own, seen in zip(sorted(ids), sorted(ids)[1:], strict=False) if own == seen), None)
    if twice is not None:
        raise SpcxrError(f"{rows.file}: image {twice} appears twice")
    kept = find_files(rows.paths, lambda row: f"{rows.file}: image {rows.paths[row] or ids[row]}", missing)
    columns = {"licence": ARCHIVES[name].licence, "source": name, **rows.columns}
    for column in ("id", "patient", "study"):
        if (values := columns.get(column)) is not None:
            columns[column] = [None if value is None else f"{name}/{value}" for value in values]
    if "source" in rows.columns:
        columns["source"] = [f"{name}/{origin}" if origin else name for origin in rows.columns["source"]]
    if any(".." in Path(path).parts for path in rows.paths if ".." in path):
        raise SpcxrError(f"{rows.file}: an image's name leads out of the archive with '..'")
    try:
        columns[LABELS_COLUMN] = label_struct(rows.labels, uncertain)
    except SpcxrError as error:
        raise SpcxrError(f"{rows.file}: {error}") from error
    table = radiographs(name, rows.paths, columns)
    return table if kept.all() else RadiographTable(table.rows.filter(pa.array(kept)), name)


PHYSIONET = "PhysioNet Credentialed Health Data License 1.5.0"
RESEARCH = "research only; see the terms of the challenge"
NLM = "NLM: free use with attribution"
EACH = "that of each source"
PICTURE_OF_KERMANY = r"person\d+_|(?:NORMAL\d*-)?IM-\d+-|(?:BACTERIA|VIRUS|NORMAL)-\d+-"
ARCHIVES: Mapping[str, Archive] = {
    "nih": Archive(
        "NIH ChestX-ray14", "NIH: free use with attribution", ("Data_Entry_2017*.csv",), read_nih,
        ("Image Index", "Finding Labels", "Patient ID"),
    ),
    "chexpert": Archive(
        "CheXpert", "Stanford research use agreement", ("train.csv|valid.csv", "train|valid"), read_chexpert,
        ("Path", "Frontal/Lateral", "AP/PA", "Lung Opacity"),
    ),
    "mimic": Archive(
        "MIMIC-CXR-JPG", PHYSIONET, ("mimic-cxr-2.*-metadata.csv*", "files"), read_mimic,
        ("dicom_id", "subject_id", "study_id", "ViewPosition"),
    ),
    "padchest": Archive(
        "PadChest", "PadChest research use agreement", ("PADCHEST*.csv*",), read_padchest,
        ("ImageID", "PatientID", "StudyID", "Projection", "Labels"),
    ),
    "vindr": Archive(
        "VinDr-CXR", PHYSIONET, ("annotations/image_labels_*.csv|image_labels_*.csv", "train|test"), read_vindr,
        ("image_id", "Cardiomegaly", "No finding"),
    ),
    "rsna": Archive(
        "RSNA pneumonia", RESEARCH, ("stage_2_train_labels.csv", "stage_2_train_images"), read_rsna,
        ("patientId", "x", "y", "width", "height", "Target"),
    ),
    "siim": Archive(
        "SIIM-ACR pneumothorax", RESEARCH, ("train-rle.csv", "dicom-images-train"), read_siim,
        ("ImageId", "EncodedPixels"),
    ),
    "covidx": Archive("COVIDx CXR-2, -3, -4", EACH, ("train.txt", "test.txt", "train"), read_covidx, ("word 4",)),
    "covid_radiography": Archive(
        "COVID-19 Radiography Database", EACH, ("COVID", "Normal", "Viral Pneumonia"), read_covid_radiography,
        classes={"COVID": "COVID", "Lung_Opacity": "Lung_Opacity", "Normal": "N", "Viral Pneumonia": "Viral"},
    ),
    "kermany": Archive(
        "Kermany", "CC BY 4.0", ("train/NORMAL", "train/PNEUMONIA"), read_kermany,
        classes={"NORMAL": PICTURE_OF_KERMANY, "PNEUMONIA": PICTURE_OF_KERMANY},
    ),
    "montgomery": Archive(
        "Montgomery County", NLM, ("CXR_png/MCUCXR_*",),
        partial(read_tuberculosis, prefix="MCUCXR", masks=montgomery_masks),
    ),
    "shenzhen": Archive(
        "Shenzhen", NLM, ("CXR_png/CHNCXR_*",), partial(read_tuberculosis, prefix="CHNCXR", masks=shenzhen_masks)
    ),
    "jsrt": Archive("JSRT, with SCR masks", "JSRT: research only", ("JPC[LN]N*.*|*/JPC[LN]N*.*",), read_jsrt),
    "cohen": Archive(
        "COVID-19 image data collection", OF_EACH_IMAGE, ("metadata.csv", "images"), read_cohen,
        ("patientid", "finding", "view", "modality", "filename"),
    ),
}  # fmt: skip
