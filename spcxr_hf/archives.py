"""Public archives of chest radiographs in the layout they are published in, all in one schema.

    read_set      -> read_archive, or a reader of `spcxr_hf.manifests`, by what lies there
    read_archive  -> which archive? -> its reader -> Rows -> files that must exist -> RadiographTable

| column | holds |
|---|---|
| `image` | struct of `bytes` and `path`; the encoded file, or where it is |
| `id` | name of the image, unique in the set; in archives `archive/path or name` |
| `patient`, `study` | who and which visit, in archives after the archive's name, as in a union; null: unknown |
| `view` | PA, AP, lateral; null: unknown, or another one |
| `sex`, `age` | F, M; years, to 120; null: unknown |
| `split` | train, val, test: the official split; null: there is none |
| `label` | the one class of the image, where the set is one of classes, in the set's words |
| `labels` | struct, a field per label as `spcxr_hf.labels` names it: 1, 0, null (NaN in `label_matrix`) missing |
| `terms` | the findings in the set's own words, before they are mapped |
| `masks` | list of `name` and a file, `path`, or a run-length code, `rle` |
| `boxes` | list of `name`, `x`, `y` (upper left corner), `width`, `height` in pixels of the image |
| `report`, `report_path` | text of the report, or the file that holds it |
| `source` | the archive, and after a slash the origin that it names |
| `licence` | of the archive, or of the image, where the archive names one; to be checked at the source |

Where torchxrayvision has a reader of an archive (the extra `xrv`), `reader="torchxrayvision"` takes its rows and labels
in place of those that are read here, which keep uncertain labels and what a set did not say; `spcxr_hf.xrv` has a
table of where the two differ. The other columns are read here in either case: it does not tell them.

Nothing is decoded and no header is read: images are looked for, not opened. What each archive gives, and where a label
is missing rather than absent, is said at its reader.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .data import RadiographTable, read_table
from .errors import SpcxrError
from .labels import CHEXPERT14, LABELS_COLUMN, NIH14, VINDR28, Uncertain, canonical_name, label_struct
from .manifests import (
    DELIMITERS,
    Missing,
    age_of,
    check_unique,
    find_files,
    numbers,
    radiographs,
    read_dataset,
    read_folder,
    read_manifest,
    read_rows,
    read_shards,
    row_number,
    sex_of,
    split_of,
    texts,
    view_of,
)
from .masks import index_files, jsrt_clinical, jsrt_masks
from .xrv import as_torchxrayvision, is_torchxrayvision, read_torchxrayvision

LabelReader = Literal["own", "torchxrayvision"]
LARGEST_SHEET = 2**28  # bytes of a worksheet, unpacked
# PadChest's terms that mean, or imply, a label (Bustos et al. 2020, the tree of findings). Labels whose branch of the
# tree is wider than the label (infiltrates, hernia, mass) are left out: their absence would not be known.
PADCHEST_TERMS = {
    "Atelectasis": ("atelectasis", "laminar atelectasis", "lobar atelectasis", "total atelectasis", "round atelectasis",
                    "segmental atelectasis", "atelectasis basal"),
    "Cardiomegaly": ("cardiomegaly",),
    "Consolidation": ("consolidation", "air bronchogram"),
    "Edema": ("pulmonary edema",),
    "Emphysema": ("emphysema",),
    "Fibrosis": ("pulmonary fibrosis",),
    "Nodule": ("nodule", "multiple nodules"),
    "Pleural Effusion": ("pleural effusion", "loculated pleural effusion", "loculated fissural effusion",
                         "hydropneumothorax"),
    "Pleural Thickening": ("pleural thickening", "apical pleural thickening", "calcified pleural thickening"),
    "Pneumonia": ("pneumonia", "atypical pneumonia"),
    "Pneumothorax": ("pneumothorax", "hydropneumothorax"),
    "Tuberculosis": ("tuberculosis",),
    "No Finding": ("normal",),
}  # fmt: skip
PADCHEST_UNREAD = {"exclude", "unchanged", "suboptimal study"}  # what they do not name is not known to be absent


# ---- any set -----------------------------------------------------------------------------------------------------


def read_set(source: Any, **options: Any) -> RadiographTable:
    """Read whatever is given, in the schema above where the source does not bring another.

    Args:
        source: A manifest (.csv, .tsv, .parquet with a column `path`); a Parquet shard or a folder of them; a .tar or
            a folder of them; a public archive; a folder that `datasets` saved; a folder of pictures; a
            `datasets.Dataset` or `DatasetDict`; a data set of torchxrayvision; the id of a set of the Hub
            (`owner/name`).
        **options: For the reader that it comes to: `read_manifest`, `read_archive`, `read_folder`, `read_shards` or
            `read_dataset`.

    Raises:
        SpcxrError: nothing is there, or the reader refuses it.
    """
    if not isinstance(source, str | os.PathLike):
        return read_torchxrayvision(source) if is_torchxrayvision(source) else read_dataset(source, **options)
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.suffix:
        return read_dataset(str(source), **options)
    return (_reader_of_folder(path) if path.is_dir() else _reader_of_file(path))(path, **options)


def _reader_of_file(path: Path) -> Callable[..., RadiographTable]:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in DELIMITERS:
        return read_manifest
    if suffix == ".tar":
        return read_shards
    if suffix == ".parquet" and path.is_file() and "path" in _parquet_columns(path):
        return read_manifest
    return read_table


def _parquet_columns(path: Path) -> list[str]:
    """The columns of a manifest; none for a shard, which has `image`, or a damaged file, for `read_table` to refuse."""
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return []
    return [] if "image" in names else names


def _reader_of_folder(path: Path) -> Callable[..., RadiographTable]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return read_dataset
    if any(path.glob("*.tar")):
        return read_shards
    if any(path.glob("*.parquet")):
        return read_table
    return read_archive if _recognised(path) else read_folder


# ---- archives ----------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """What an archive's tables say, a row per image.

    Attributes:
        file: The table, or the folder, that names the images; for messages.
        paths: (n,) image files; "" where none is found by that name.
        columns: Columns of the schema, (n,) each; `id` is required; without the archive's name.
        labels: (n,) each: 1, 0, -1 uncertain, NaN missing.
    """

    file: Path
    paths: list[str]
    columns: dict[str, Any]
    labels: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Archive:
    """A public archive.

    Attributes:
        title: Its name in full.
        licence: What it may be used for, in short.
        markers: What must lie in its folder: patterns, `a|b` for either.
        read: Its folder -> its rows.
    """

    title: str
    licence: str
    markers: tuple[str, ...]
    read: Callable[[Path], Rows]


def read_archive(
    folder: str | os.PathLike,
    name: str | None = None,
    *,
    uncertain: Uncertain = "ignore",
    missing: Missing = "error",
    reader: LabelReader = "own",
) -> RadiographTable:
    """Read a public archive in its published layout.

    Args:
        folder: Where it lies: its own folder, or the one above.
        name: A key of `ARCHIVES`; None: recognised by its files.
        uncertain: What becomes of labels that are uncertain: `ignore` (missing), `zero`, `one`.
        missing: `error`: every image that the archive's tables name must be there; `skip`: those that are not are left
            out with a warning, as after a partial download.
        reader: `own`: all is read here; `torchxrayvision`: its rows and labels, of the archives that it has a reader
            of (see above). It makes uncertain labels missing.

    Returns:
        A row per image, in the order of the archive's tables.

    Raises:
        SpcxrError: it is none of the archives, or not the named one (the message says what was expected); a table
            cannot be read, lacks a column or names an image twice; an image is missing; there is no such reader, or
            torchxrayvision cannot read the archive.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SpcxrError(f"{root}: no such folder")
    if reader not in get_args(LabelReader):
        raise SpcxrError(f"reader must be {' or '.join(get_args(LabelReader))}; got {reader!r}")
    if reader != "own" and uncertain != "ignore":
        raise SpcxrError(f"{reader} makes uncertain labels missing; got uncertain={uncertain!r}")
    key, place = _find_archive(root, name)
    table = _table_of(key, ARCHIVES[key].read(place), uncertain, missing)
    return table if reader == "own" else as_torchxrayvision(table, key, place)


def _find_archive(root: Path, name: str | None) -> tuple[str, Path]:
    """The archive in this folder, or the one of this name, and where its tables lie."""
    if name is not None and name not in ARCHIVES:
        raise SpcxrError(f"no archive is called {name!r}; there are {', '.join(ARCHIVES)}")
    found = _recognised(root, name)
    if found is None:
        wanted = ARCHIVES if name is None else {name: ARCHIVES[name]}
        expected = "; ".join(f"{key}: {', '.join(archive.markers)}" for key, archive in wanted.items())
        raise SpcxrError(
            f"{root}: {'none of the known archives' if name is None else f'not {name}'}; expected {expected}"
        )
    return found


def _recognised(root: Path, name: str | None = None) -> tuple[str, Path] | None:
    """The archive in this folder, or in the one of its subfolders that holds one, and where."""
    keys = list(ARCHIVES) if name is None else [name]
    places = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    found = [(key, place) for place in places for key in keys if _has_markers(place, ARCHIVES[key].markers)]
    # a folder of several archives is none of them; one that is packed twice (Kermany's) is the outer one
    return found[0] if len({key for key, _ in found}) == 1 else None


def _has_markers(place: Path, markers: Iterable[str]) -> bool:
    return all(any(any(place.glob(pattern)) for pattern in marker.split("|")) for marker in markers)


def _table_of(name: str, rows: Rows, uncertain: Uncertain, missing: Missing) -> RadiographTable:
    if not rows.paths:
        raise SpcxrError(f"{rows.file}: no images of {ARCHIVES[name].title}")
    ids = rows.columns["id"]
    twice = next((own for own, seen in zip(sorted(ids), sorted(ids)[1:], strict=False) if own == seen), None)
    if twice is not None:
        raise SpcxrError(f"{rows.file}: image {twice} stands twice")
    kept = find_files(rows.paths, lambda row: f"{rows.file}: image {rows.paths[row] or ids[row]}", missing)
    columns = {"licence": ARCHIVES[name].licence, "source": name, **rows.columns}
    for column in ("id", "patient", "study"):
        if (values := columns.get(column)) is not None:
            columns[column] = [None if value is None else f"{name}/{value}" for value in values]
    if "source" in rows.columns:
        columns["source"] = [f"{name}/{origin}" if origin else name for origin in rows.columns["source"]]
    try:
        columns[LABELS_COLUMN] = label_struct(rows.labels, uncertain)
    except SpcxrError as error:
        raise SpcxrError(f"{rows.file}: {error}") from error
    table = radiographs(name, rows.paths, columns)
    return table if kept.all() else RadiographTable(table.rows.filter(pa.array(kept)), name)


def _stacked(parts: Sequence[Rows]) -> Rows:
    """Rows of several tables, one after another; what one does not have is missing there."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {
        name: [value for part in parts for value in part.columns.get(name, [None] * len(part.paths))] for name in names
    }
    keys = dict.fromkeys(name for part in parts for name in part.labels)
    labels = {
        key: np.concatenate([part.labels.get(key, np.full(len(part.paths), np.nan, np.float32)) for part in parts])
        for key in keys
    }
    return Rows(parts[0].file, [path for part in parts for path in part.paths], columns, labels)


def _filled(table: pa.Table, column: str, path: Path) -> list[str]:
    """A column as text that has no empty cell."""
    values = texts(table, column)
    if None in values:
        raise SpcxrError(f"{path}: row {row_number(path, values.index(None))}: no {column}")
    return [str(value) for value in values]


def _present(members: Sequence[Iterable[str] | None], name: str) -> np.ndarray:
    """(n,) whether a row's members have this name; NaN where they are None."""
    return np.array([np.nan if row is None else name in row for row in members], np.float32)


def _grouped_boxes(
    names: Sequence[str], labels: Sequence[str | None], corners: np.ndarray, sizes: np.ndarray
) -> dict[str, list[dict]]:
    """Image -> its boxes; rows without a corner are passed over. `corners` and `sizes` are (n, 2)."""
    found: dict[str, list[dict]] = {}
    for row in np.flatnonzero(~np.isnan(np.concatenate([corners, sizes], axis=1)).any(axis=1)).tolist():
        (x, y), (width, height) = corners[row], sizes[row]
        name = canonical_name(labels[row] or "")
        found.setdefault(names[row], []).append({"name": name, "x": x, "y": y, "width": width, "height": height})
    return found


# ---- text-mined sets ---------------------------------------------------------------------------------------------


def _read_nih(root: Path) -> Rows:
    """NIH ChestX-ray14 (Wang et al. 2017): `Data_Entry_2017*.csv`, `images_*/images/*.png`, lists, boxes.

    Text-mined: a label that is not listed is taken as absent, as its authors do. `train_val_list.txt` is one list: its
    images are `train`, there is no official val.
    """
    file = max(root.glob("Data_Entry_2017*.csv"))  # _v2020 corrects the first
    rows = read_rows(file, ("Image Index", "Finding Labels", "Patient ID"))
    names = _filled(rows, "Image Index", file)
    check_unique(names, file, "image")
    listed = [text.split("|") for text in _filled(rows, "Finding Labels", file)]
    terms = [{canonical_name(term) for term in row} for row in listed]
    known = (*NIH14, "No Finding")
    for row, own in enumerate(terms):
        if not own <= set(known):
            raise SpcxrError(
                f"{file}: row {row_number(file, row)}: {', '.join(own - set(known))} is no label of the set"
            )
    index = index_files(root, suffixes=[".png"])
    splits = {name: split for split in ("train", "test") for name in _listed(root, split)}
    boxes = _nih_boxes(root)
    patients = _filled(rows, "Patient ID", file)
    columns = {
        "id": names,
        "patient": patients,
        "study": [f"{one}_{visit}" for one, visit in zip(patients, texts(rows, "Follow-up #"), strict=True)],
        "view": [view_of(text) for text in texts(rows, "View Position")],
        "sex": [sex_of(text) for text in texts(rows, _either(rows, "Patient Gender", "Patient Sex"))],
        "age": [age_of(text) for text in texts(rows, "Patient Age")],
        "split": [splits.get(name) for name in names],
        "terms": listed,
        "boxes": [boxes.get(name) for name in names],
    }
    return Rows(file, [index.get(name, "") for name in names], columns, {key: _present(terms, key) for key in known})


def _listed(root: Path, split: str) -> list[str]:
    file = root / {"train": "train_val_list.txt", "test": "test_list.txt"}[split]
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def _either(rows: pa.Table, *names: str) -> str:
    """The first of these columns that is there."""
    return next((name for name in names if name in rows.column_names), names[0])


def _nih_boxes(root: Path) -> dict[str, list[dict]]:
    file = next(iter(sorted(root.glob("BBox_List_2017*.csv"))), None)
    if file is None:
        return {}
    rows = read_rows(file, ("Image Index", "Finding Label"))
    # its header calls the four numbers `Bbox [x`, `y`, `w`, `h]`
    sides = np.stack([numbers(rows, column, file) for column in rows.column_names[2:6]], axis=1)
    labels = ["Infiltration" if text == "Infiltrate" else text for text in texts(rows, "Finding Label")]
    return _grouped_boxes(_filled(rows, "Image Index", file), labels, sides[:, :2], sides[:, 2:])


def _read_chexpert(root: Path) -> Rows:
    """CheXpert (Irvin et al. 2019), also `-small`: `train.csv`, `valid.csv`.

    A blank is missing, also beside a No Finding, and -1 uncertain.
    """
    files = [(root / f"{folder}.csv", split) for folder, split in (("train", "train"), ("valid", "val"))]
    return _stacked([_chexpert_part(root, file, split) for file, split in files if file.is_file()])


def _chexpert_part(root: Path, file: Path, split: str) -> Rows:
    rows = read_rows(file, ("Path", "Frontal/Lateral", "AP/PA", *CHEXPERT14))
    names = []
    for row, text in enumerate(_filled(rows, "Path", file)):
        match = re.search(r"(?:^|/)((?:train|valid)/(patient\d+)/(study\d+)/[^/]+)$", text)
        if match is None:
            raise SpcxrError(f"{file}: row {row_number(file, row)}: {text} is not .../patientN/studyN/view")
        names.append(match.groups())
    directions = zip(texts(rows, "Frontal/Lateral"), texts(rows, "AP/PA"), strict=True)
    columns = {
        "id": [name for name, _, _ in names],
        "patient": [patient for _, patient, _ in names],
        "study": [f"{patient}/{study}" for _, patient, study in names],
        "view": ["lateral" if plane == "Lateral" else view_of(view) for plane, view in directions],
        "sex": [sex_of(text) for text in texts(rows, "Sex")],
        "age": [age_of(text) for text in texts(rows, "Age")],
        "split": [split] * len(names),
    }
    labels = {name: numbers(rows, name, file).astype(np.float32) for name in CHEXPERT14}
    return Rows(file, [f"{root}{os.sep}{name}" for name, _, _ in names], columns, labels)


def _read_mimic(root: Path) -> Rows:
    """MIMIC-CXR-JPG (Johnson et al. 2019): `mimic-cxr-2.*-{metadata,chexpert,split}.csv[.gz]`, `files/pNN/pN/sN/*.jpg`.

    Labels belong to the study; a study without a row, or a blank cell, is missing. Reports are MIMIC-CXR's own:
    `report_path` is set where `files/pNN/pN/sN.txt` lies beside.
    """
    file, split_file, label_file = (_mimic_table(root, kind) for kind in ("metadata", "split", "chexpert"))
    rows = read_rows(file, ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    images, patients, studies = (_filled(rows, name, file) for name in ("dicom_id", "subject_id", "study_id"))
    split_rows = read_rows(split_file, ("dicom_id", "split"))
    splits = dict(zip(texts(split_rows, "dicom_id"), texts(split_rows, "split"), strict=True))
    label_rows = read_rows(label_file, ("study_id", *CHEXPERT14))
    labelled = _filled(label_rows, "study_id", label_file)
    check_unique(labelled, label_file, "study")
    row_of = {study: row for row, study in enumerate(labelled)}
    # the last row, which is added, is of studies without labels
    place = np.array([row_of.get(study, len(labelled)) for study in studies], dtype=np.int64)
    labels = {name: np.append(numbers(label_rows, name, label_file), np.nan)[place] for name in CHEXPERT14}
    folders = [
        os.path.join(root, "files", f"p{patient[:2]}", f"p{patient}", f"s{study}")  # noqa: PTH118 (a path per image)
        for patient, study in zip(patients, studies, strict=True)
    ]
    texts_there = {folder for folder in set(folders) if os.path.isfile(f"{folder}.txt")}  # noqa: PTH113
    columns = {
        "id": images,
        "patient": patients,
        "study": studies,
        "view": [view_of(text) for text in texts(rows, "ViewPosition")],
        "split": [split_of(splits.get(image)) for image in images],
        "report_path": [f"{folder}.txt" if folder in texts_there else None for folder in folders],
    }
    paths = [f"{folder}{os.sep}{image}.jpg" for folder, image in zip(folders, images, strict=True)]
    return Rows(file, paths, columns, labels)


def _mimic_table(root: Path, kind: str) -> Path:
    file = next(iter(sorted(root.glob(f"mimic-cxr-2.*-{kind}.csv*"))), None)
    if file is None:
        raise SpcxrError(f"{root}: no mimic-cxr-2.*-{kind}.csv[.gz]")
    return file


def _read_padchest(root: Path) -> Rows:
    """PadChest (Bustos et al. 2020): `PADCHEST*.csv[.gz]`, 16-bit PNG in numbered folders, or in one.

    `terms` has the labels as they are; `labels` those of `PADCHEST_TERMS`. A row without labels is missing; one that
    says `exclude`, `unchanged` or `suboptimal study` is known for what it names, the rest is missing.
    """
    file = min(root.glob("PADCHEST*.csv*"))
    rows = read_rows(file, ("ImageID", "PatientID", "StudyID", "Projection", "Labels"))
    names = _filled(rows, "ImageID", file)
    check_unique(names, file, "image")
    terms = [_padchest_terms(text) for text in texts(rows, "Labels")]
    index = index_files(root, suffixes=[".png"])
    dates, births = texts(rows, "StudyDate_DICOM"), texts(rows, "PatientBirth")
    columns = {
        "id": names,
        "patient": texts(rows, "PatientID"),
        "study": texts(rows, "StudyID"),
        "view": [view_of(text) for text in texts(rows, "Projection")],
        "sex": [sex_of(text) for text in texts(rows, _either(rows, "PatientSex_DICOM", "PatientSex"))],
        "age": [_years_between(born, date) for born, date in zip(births, dates, strict=True)],
        "terms": terms,
        "report": texts(rows, "Report"),
    }
    labels = {name: _padchest_label(terms, set(words)) for name, words in PADCHEST_TERMS.items()}
    return Rows(file, [index.get(name, "") for name in names], columns, labels)


def _padchest_terms(text: str | None) -> list[str] | None:
    """`['pleural effusion', 'kyphosis ']` -> its words; None for none."""
    words = [word.strip(" '\"") for word in (text or "").strip("[]").split(",")]
    return [word for word in words if word] or None


def _padchest_label(terms: Sequence[Sequence[str] | None], words: set[str]) -> np.ndarray:
    values = np.full(len(terms), np.nan, np.float32)
    for row, own in enumerate(terms):
        if own is not None and not words.isdisjoint(own):
            values[row] = 1
        elif own is not None and PADCHEST_UNREAD.isdisjoint(own):
            values[row] = 0
    return values


def _years_between(born: str | None, date: str | None) -> float | None:
    """Year of birth and a date as 20140915 -> age."""
    if not born or not date or not date[:4].isdigit():
        return None
    try:
        return age_of(str(int(date[:4]) - int(float(born))))
    except (ValueError, OverflowError):
        return None


# ---- sets read by radiologists -----------------------------------------------------------------------------------


def _read_vindr(root: Path) -> Rows:
    """VinDr-CXR (Nguyen et al. 2022): `annotations/image_labels_*.csv`, `annotations_*.csv`, `{train,test}/*.dicom`.

    Three radiologists read each training image: present if most of them say so, absent if none does, otherwise
    uncertain. The test labels are a consensus. Patients are not published. Boxes are those of every reader.
    """
    place = root / "annotations" if (root / "annotations").is_dir() else root
    files = [(place / f"image_labels_{split}.csv", split) for split in ("train", "test")]
    return _stacked([_vindr_part(root, file, split) for file, split in files if file.is_file()])


def _vindr_part(root: Path, file: Path, split: str) -> Rows:
    rows = read_rows(file, ("image_id",))
    found = {canonical_name(name): name for name in rows.column_names}
    absent = [name for name in VINDR28 if name not in found]
    if absent:
        raise SpcxrError(f"{file}: no column for {', '.join(absent)}; it is not VinDr-CXR's")
    read = _filled(rows, "image_id", file)
    names = list(dict.fromkeys(read))
    number = {name: row for row, name in enumerate(names)}
    place = np.array([number[name] for name in read])
    readers = np.bincount(place, minlength=len(names))
    labels = {}
    for label in VINDR28:
        votes = np.bincount(place, numbers(rows, found[label], file), minlength=len(names))
        labels[label] = np.where(2 * votes > readers, 1, np.where(votes == 0, 0, -1)).astype(np.float32)
        labels[label][np.isnan(votes)] = np.nan
    boxes = _vindr_boxes(file.with_name(f"annotations_{split}.csv"))
    columns = {"id": names, "split": [split] * len(names), "boxes": [boxes.get(name) for name in names]}
    return Rows(file, [f"{root}{os.sep}{split}{os.sep}{name}.dicom" for name in names], columns, labels)


def _vindr_boxes(file: Path) -> dict[str, list[dict]]:
    if not file.is_file():
        return {}
    rows = read_rows(file, ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max"))
    low, high = (np.stack([numbers(rows, f"{axis}_{end}", file) for axis in "xy"], axis=1) for end in ("min", "max"))
    return _grouped_boxes(_filled(rows, "image_id", file), texts(rows, "class_name"), low, high - low)


def _read_rsna(root: Path) -> Rows:
    """RSNA pneumonia detection 2018 (Shih et al. 2019): `stage_2_*.csv`, `stage_2_{train,test}_images/*.dcm`.

    `label` is the class of three; Lung Opacity is 1 where there is a box. Test images have no labels. `patientId` is
    one per image: the pictures are NIH's, and which of them are of one patient is not published.
    """
    file = root / "stage_2_train_labels.csv"
    rows = read_rows(file, ("patientId", "x", "y", "width", "height", "Target"))
    read = _filled(rows, "patientId", file)
    targets = dict(zip(read, numbers(rows, "Target", file), strict=True))
    sides = [
        np.stack([numbers(rows, side, file) for side in pair], axis=1) for pair in (("x", "y"), ("width", "height"))
    ]
    boxes = _grouped_boxes(read, ["Lung Opacity"] * len(read), *sides)
    classes: dict[str, str | None] = {}
    class_file = root / "stage_2_detailed_class_info.csv"
    if class_file.is_file():
        class_rows = read_rows(class_file, ("patientId", "class"))
        classes = dict(zip(_filled(class_rows, "patientId", class_file), texts(class_rows, "class"), strict=True))
    names = list(targets)
    label = [classes.get(name) for name in names]
    normal = np.array([np.nan if own is None else own == "Normal" for own in label], np.float32)
    columns = {"id": names, "patient": names, "label": label, "boxes": [boxes.get(name) for name in names]}
    train = Rows(
        file,
        [f"{root / 'stage_2_train_images'}{os.sep}{name}.dcm" for name in names],
        columns | {"split": ["train"] * len(names)},
        {"Lung Opacity": np.array([targets[name] for name in names], np.float32), "No Finding": normal},
    )
    test = {
        name[: -len(".dcm")]: path
        for name, path in index_files(root / "stage_2_test_images", suffixes=[".dcm"]).items()
    }
    own = sorted(test)
    return _stacked(
        [train, Rows(file, [test[name] for name in own], {"id": own, "patient": own, "split": ["test"] * len(own)})]
    )


def _read_siim(root: Path) -> Rows:
    """SIIM-ACR pneumothorax 2019: `train-rle.csv`, `dicom-images-{train,test}/*/*/*.dcm`.

    Masks are run-length codes (`rle_mask`), the empty one where there is no pneumothorax. Images of the folder that the
    table does not name, and those of test, are not labelled. Patients stand in the DICOM headers, which are not read.
    """
    file = root / "train-rle.csv"
    rows = read_rows(file, ("ImageId", "EncodedPixels"))
    codes: dict[str, list[str]] = {}
    for name, code in zip(_filled(rows, "ImageId", file), _filled(rows, "EncodedPixels", file), strict=True):
        codes.setdefault(name, []).append("" if code == "-1" else code)
    parts = []
    for split in ("train", "test"):
        found = {
            name[: -len(".dcm")]: path
            for name, path in index_files(root / f"dicom-images-{split}", suffixes=[".dcm"]).items()
        }
        names = [*codes, *sorted(found.keys() - codes.keys())] if split == "train" else sorted(found)
        masks = [
            [{"name": "pneumothorax", "path": None, "rle": code} for code in codes[name]] if name in codes else None
            for name in names
        ]
        labels = np.array([any(codes[name]) if name in codes else np.nan for name in names], np.float32)
        columns = {"id": names, "split": [split] * len(names), "masks": masks}
        parts.append(Rows(file, [found.get(name, "") for name in names], columns, {"Pneumothorax": labels}))
    return _stacked(parts)


# ---- sets of classes ---------------------------------------------------------------------------------------------

# What a class says of the labels; the others are not known.
CLASS_LABELS: Mapping[str, Mapping[str, float]] = {
    "positive": {"COVID-19": 1, "No Finding": 0},
    "negative": {"COVID-19": 0},
    "COVID-19": {"COVID-19": 1, "No Finding": 0},
    "COVID": {"COVID-19": 1, "No Finding": 0},
    "pneumonia": {"COVID-19": 0, "Pneumonia": 1, "No Finding": 0},
    "normal": {"COVID-19": 0, "Pneumonia": 0, "No Finding": 1},
    "Normal": {"COVID-19": 0, "Lung Opacity": 0, "Pneumonia": 0, "Viral Pneumonia": 0, "No Finding": 1},
    "Lung_Opacity": {"COVID-19": 0, "Lung Opacity": 1, "No Finding": 0},
    "Viral Pneumonia": {"COVID-19": 0, "Pneumonia": 1, "Viral Pneumonia": 1, "No Finding": 0},
    "NORMAL": {"Pneumonia": 0, "Bacterial Pneumonia": 0, "Viral Pneumonia": 0, "No Finding": 1},
    "bacterial": {"Pneumonia": 1, "Bacterial Pneumonia": 1, "Viral Pneumonia": 0, "No Finding": 0},
    "viral": {"Pneumonia": 1, "Bacterial Pneumonia": 0, "Viral Pneumonia": 1, "No Finding": 0},
    "PNEUMONIA": {"Pneumonia": 1, "No Finding": 0},
}


def _class_labels(classes: Sequence[str]) -> dict[str, np.ndarray]:
    said = [CLASS_LABELS[name] for name in classes]
    keys = dict.fromkeys(key for row in said for key in row)
    return {key: np.array([row.get(key, np.nan) for row in said], np.float32) for key in keys}


def _read_covidx(root: Path) -> Rows:
    """COVIDx CXR-2 to CXR-4 (Wang et al. 2020): `{train,val,test}.txt` (patient, file, class, source), their folders.

    The patients of two sources may have one number, so the source stands before it.
    """
    files = [(root / f"{split}.txt", split) for split in ("train", "val", "test")]
    return _stacked([_covidx_part(root, file, split) for file, split in files if file.is_file()])


def _covidx_part(root: Path, file: Path, split: str) -> Rows:
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"(\S+)\s+(\S.*?)\s+(\S+)\s+(\S+)\s*", line)  # old versions have spaces in file names
        if line.strip() and (match is None or match[3] not in CLASS_LABELS):
            raise SpcxrError(
                f"{file}: row {number}: not a patient, a file, a class and a source: {line.strip()[:80]!r}"
            )
        lines += [match.groups()] if match else []
    columns = {
        "id": [f"{split}/{name}" for _, name, _, _ in lines],
        "patient": [f"{source}/{patient}" for patient, _, _, source in lines],
        "split": [split] * len(lines),
        "label": [label for _, _, label, _ in lines],
        "source": [source for _, _, _, source in lines],
    }
    paths = [str(root / split / name) for _, name, _, _ in lines]
    return Rows(file, paths, columns, _class_labels([label for _, _, label, _ in lines]))


def _read_covid_radiography(root: Path) -> Rows:
    """COVID-19 Radiography Database (Chowdhury et al. 2020): a folder per class with `images/`, `masks/`, and an .xlsx.

    `source` has the URL of the .xlsx. A COVID-19 image is not known to have, or lack, a lung opacity.
    """
    parts = []
    for name in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        folder = root / name / "images" if (root / name / "images").is_dir() else root / name
        files = sorted(folder.glob("*.png"), key=lambda file: (len(file.name), file.name))
        origins = _covid_origins(root / f"{name}.metadata.xlsx")
        masks = {file.name for file in (root / name / "masks").glob("*.png")}
        columns = {
            "id": [f"{name}/{file.name}" for file in files],
            "label": [name] * len(files),
            "masks": [
                [{"name": "lungs", "path": str(root / name / "masks" / file.name), "rle": None}]
                if file.name in masks
                else None
                for file in files
            ],
            "source": [origins.get(file.stem.casefold()) for file in files],
        }
        parts.append(Rows(root, [str(file) for file in files], columns, _class_labels([name] * len(files))))
    return _stacked(parts)


def _covid_origins(file: Path) -> dict[str, str]:
    """Image, in lower case -> its URL."""
    if not file.is_file():
        return {}
    sheet = _read_sheet(file)
    header = [str(name).strip().upper() for name in sheet[0]] if sheet else []
    if "FILE NAME" not in header or "URL" not in header:
        raise SpcxrError(f"{file}: no columns FILE NAME and URL; there are {', '.join(header) or 'none'}")
    name, url = header.index("FILE NAME"), header.index("URL")
    width = max(name, url)
    return {row[name].casefold(): row[url] for row in sheet[1:] if len(row) > width and row[name]}


def _read_sheet(file: Path) -> list[list[str]]:
    """The cells of a workbook's first sheet (ISO/IEC 29500, SpreadsheetML) as text, rows without a gap."""
    spaces = {"s": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    try:
        with zipfile.ZipFile(file) as archive:
            strings = []
            if "xl/sharedStrings.xml" in archive.namelist():
                shared = _parse_part(archive, "xl/sharedStrings.xml").iterfind("s:si", spaces)
                strings = ["".join(text.text or "" for text in entry.iter(f"{{{spaces['s']}}}t")) for entry in shared]
            sheet = _parse_part(archive, "xl/worksheets/sheet1.xml")
        return [
            _sheet_row(row.findall("s:c", spaces), strings, spaces)
            for row in sheet.iterfind("s:sheetData/s:row", spaces)
        ]
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, KeyError, ValueError, IndexError) as error:
        raise SpcxrError(f"{file}: not a readable .xlsx ({error})") from error


def _parse_part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > LARGEST_SHEET:
        raise ValueError(f"{name} is too large")
    return ElementTree.fromstring(archive.read(name))


def _sheet_row(cells: Sequence[ElementTree.Element], strings: Sequence[str], spaces: dict[str, str]) -> list[str]:
    values: list[str] = []
    for cell in cells:
        letters = re.sub(r"\d", "", cell.get("r", ""))
        column = 0
        for letter in letters:
            column = 26 * column + ord(letter) - ord("A") + 1
        values += [""] * (column - 1 - len(values))  # empty cells are left out of the file
        text = cell.findtext("s:v", "", spaces) or cell.findtext("s:is/s:t", "", spaces)
        values.append(strings[int(text)] if cell.get("t") == "s" else text)
    return values


def _read_kermany(root: Path) -> Rows:
    """Children's pneumonia (Kermany et al. 2018): `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    The names tell the person and bacterial or viral. Persons of `test` are numbered by themselves, so their names have
    `test/` before them.
    """
    paths, columns = [], {"id": [], "patient": [], "split": [], "label": []}  # type: ignore[var-annotated]
    for split in ("train", "val", "test"):
        for folder in ("NORMAL", "PNEUMONIA"):
            files = sorted(index_files(root / split / folder, suffixes=[".jpeg", ".jpg", ".png"]).items())
            people = [_kermany_person(name) for name, _ in files]
            paths += [path for _, path in files]
            columns["id"] += [f"{split}/{folder}/{name}" for name, _ in files]
            columns["patient"] += [f"test/{one}" if one and split == "test" else one for one in people]
            columns["split"] += [split] * len(files)
            columns["label"] += [_kermany_class(folder, name) for name, _ in files]
    return Rows(root, paths, columns, _class_labels(columns["label"]))


def _kermany_person(name: str) -> str | None:
    """`person1_virus_6.jpeg` (Kaggle), `NORMAL2-IM-0112-0001.jpeg`, `BACTERIA-1008087-0001.jpeg` (version 3) -> who."""
    match = re.match(r"(person\d+)_|((?:NORMAL\d*-)?IM-\d+)-|(?:BACTERIA|VIRUS|NORMAL)-(\d+)-", name)
    return next((group for group in match.groups() if group), None) if match else None


def _kermany_class(folder: str, name: str) -> str:
    if folder == "NORMAL":
        return folder
    kinds = {"bacterial": ("_bacteria_", "bacteria-"), "viral": ("_virus_", "virus-")}
    return next((kind for kind, marks in kinds.items() if any(mark in name.lower() for mark in marks)), folder)


def _read_tuberculosis(root: Path, prefix: str, masks: Callable[[Path, str], list[dict]]) -> Rows:
    """Montgomery County and Shenzhen (Jaeger et al. 2014): the name ends in 1 where there is tuberculosis.

    All are taken as PA, as the paper says. The readings have sex, age and what was seen.
    """
    files = sorted((root / "CXR_png").glob(f"{prefix}_*_[01].png"))
    readings = [root / "ClinicalReadings" / f"{file.stem}.txt" for file in files]
    said = [file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None for file in readings]
    sexes = [re.search(r"\b(female|male|F|M)\b", text or "", re.IGNORECASE) for text in said]
    ages = [re.search(r"(\d+)\s*(?:Y|y|m|M|d|D)\w*", text or "") for text in said]
    label = np.array([file.stem[-1] == "1" for file in files], np.float32)
    columns = {
        "id": [file.name for file in files],
        "patient": [file.stem.split("_")[1] for file in files],
        "view": ["PA"] * len(files),
        "sex": [match and sex_of(match[1]) for match in sexes],
        "age": [match and age_of(match[0]) for match in ages],
        "label": ["tuberculosis" if own else "normal" for own in label],
        "masks": [masks(root, file.stem) or None for file in files],
        "report": said,
        "report_path": [str(file) if file.is_file() else None for file in readings],
    }
    return Rows(root / "CXR_png", [str(file) for file in files], columns, {"Tuberculosis": label})


def _existing_masks(files: Mapping[str, Path]) -> list[dict]:
    return [{"name": name, "path": str(file), "rle": None} for name, file in files.items() if file.is_file()]


def _montgomery_masks(root: Path, stem: str) -> list[dict]:
    folder = root / "ManualMask"
    return _existing_masks({f"{side} lung": folder / f"{side}Mask" / f"{stem}.png" for side in ("left", "right")})


def _shenzhen_masks(root: Path, stem: str) -> list[dict]:
    """Of Stirenko et al. 2018, published beside the set: `mask/NAME_mask.png`."""
    places = [root / folder / f"{stem}_mask.png" for folder in ("mask", "masks")]
    return _existing_masks({"lungs": next((file for file in places if file.is_file()), places[0])})


def _read_jsrt(root: Path) -> Rows:
    """JSRT nodules (Shiraishi et al. 2000): `JPC{LN,NN}NNN.IMG`, or .png; masks of SCR (van Ginneken et al. 2006).

    `CLNDAT_EN.txt` and `CNNDAT_EN.TXT` have age, sex and the nodule. The raw .IMG has no header:
    `spcxr_hf.masks.convert_jsrt` makes PNG files of them, which are preferred where both are there.
    """
    index = index_files(root, suffixes=[".img", ".png"])
    found: dict[str, str] = {}
    for name in sorted(index, key=lambda name: name.lower().endswith(".png")):
        if re.fullmatch(r"JPC[LN]N\d{3}", Path(name).stem):
            found[Path(name).stem] = index[name]  # a .png comes last
    names = sorted(found)
    clinical = jsrt_clinical(root)
    masks = jsrt_masks(root)
    nodule = np.array([name.startswith("JPCLN") for name in names], np.float32)
    known = [clinical.get(name, {}) for name in names]
    columns = {
        "id": names,
        "patient": names,  # one image each
        "view": ["PA"] * len(names),
        "sex": [own.get("sex") for own in known],
        "age": [own.get("age") for own in known],
        "label": ["nodule" if own else "non-nodule" for own in nodule],
        "boxes": [own.get("boxes") for own in known],
        "masks": [masks.get(name) for name in names],
    }
    return Rows(root, [found[name] for name in names], columns, {"Nodule": nodule})


def _read_cohen(root: Path) -> Rows:
    """COVID-19 image data collection (Cohen et al. 2020): `metadata.csv`, `images/`; CT is left out.

    `finding` is a path as `Pneumonia/Viral/COVID-19`. COVID-19 is absent where there is no finding or another cause is
    named; it is missing for a plain `Pneumonia`, `todo` and `Unknown`.
    """
    file = root / "metadata.csv"
    rows = read_rows(file, ("patientid", "finding", "view", "modality", "filename"))
    modality, folders = texts(rows, "modality"), texts(rows, "folder")
    is_picture = [kind == "X-ray" and place in (None, "images") for kind, place in zip(modality, folders, strict=True)]
    rows = rows.filter(pa.array(is_picture))
    names = _filled(rows, "filename", file)
    terms = [text.split("/") if text and text not in ("todo", "Unknown") else None for text in texts(rows, "finding")]
    labels = {name: _cohen_label(terms, name) for name in ("COVID-19", "Pneumonia", "Tuberculosis", "No Finding")}
    columns = {
        "id": names,
        "patient": texts(rows, "patientid"),
        "view": [view_of(text) for text in texts(rows, "view")],
        "sex": [sex_of(text) for text in texts(rows, "sex")],
        "age": [age_of(text) for text in texts(rows, "age")],
        "label": texts(rows, "finding"),
        "terms": terms,
        "report": texts(rows, _either(rows, "clinical_notes", "clinical notes")),
        "source": texts(rows, "location"),
        "licence": [text or ARCHIVES["cohen"].licence for text in texts(rows, "license")],
    }
    return Rows(file, [str(root / "images" / name) for name in names], columns, labels)


def _cohen_label(terms: Sequence[Sequence[str] | None], name: str) -> np.ndarray:
    values = np.full(len(terms), np.nan, np.float32)
    for row, own in enumerate(terms):
        if own is None:
            continue
        another_cause = name == "COVID-19" and len(own) > 2  # Pneumonia/Bacterial/Legionella
        if name in own:
            values[row] = 1
        elif "No Finding" in own or name == "No Finding" or another_cause:
            values[row] = 0
    return values


def _read_montgomery(root: Path) -> Rows:
    return _read_tuberculosis(root, "MCUCXR", _montgomery_masks)


def _read_shenzhen(root: Path) -> Rows:
    return _read_tuberculosis(root, "CHNCXR", _shenzhen_masks)


PHYSIONET = "PhysioNet Credentialed Health Data License 1.5.0"
RESEARCH = "research only; see the terms of the challenge"
NLM = "NLM: free use with attribution"
EACH = "that of each source"
ARCHIVES: Mapping[str, Archive] = {
    "nih": Archive("NIH ChestX-ray14", "NIH: free use with attribution", ("Data_Entry_2017*.csv",), _read_nih),
    "chexpert": Archive(
        "CheXpert", "Stanford research use agreement", ("train.csv|valid.csv", "train|valid"), _read_chexpert
    ),
    "mimic": Archive("MIMIC-CXR-JPG", PHYSIONET, ("mimic-cxr-2.*-metadata.csv*", "files"), _read_mimic),
    "padchest": Archive("PadChest", "PadChest research use agreement", ("PADCHEST*.csv*",), _read_padchest),
    "vindr": Archive(
        "VinDr-CXR", PHYSIONET, ("annotations/image_labels_*.csv|image_labels_*.csv", "train|test"), _read_vindr
    ),
    "rsna": Archive("RSNA pneumonia", RESEARCH, ("stage_2_train_labels.csv", "stage_2_train_images"), _read_rsna),
    "siim": Archive("SIIM-ACR pneumothorax", RESEARCH, ("train-rle.csv", "dicom-images-train"), _read_siim),
    "covidx": Archive("COVIDx CXR-2, -3, -4", EACH, ("train.txt", "test.txt", "train"), _read_covidx),
    "covid_radiography": Archive(
        "COVID-19 Radiography Database", EACH, ("COVID", "Normal", "Viral Pneumonia"), _read_covid_radiography
    ),
    "kermany": Archive("Kermany", "CC BY 4.0", ("train/NORMAL", "train/PNEUMONIA"), _read_kermany),
    "montgomery": Archive("Montgomery County", NLM, ("CXR_png/MCUCXR_*",), _read_montgomery),
    "shenzhen": Archive("Shenzhen", NLM, ("CXR_png/CHNCXR_*",), _read_shenzhen),
    "jsrt": Archive("JSRT, with SCR masks", "JSRT: research only", ("JPC*.*|*/JPC*.*",), _read_jsrt),
    "cohen": Archive("COVID-19 image data collection", "that of each image", ("metadata.csv", "images"), _read_cohen),
}
