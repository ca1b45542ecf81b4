"""Readers of the public archives that are sets of classes: COVID-19, pneumonia of children, tuberculosis, nodules.

Each takes the folder of an archive in its published layout and gives `Rows`; `archives.ARCHIVES` names them all.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from spcxr_hf.data.archives.rows import Rows, either, filled, stacked
from spcxr_hf.data.manifests import age_of, in_one_spelling, read_rows, sex_of, texts
from spcxr_hf.data.masks import index_files, jsrt_clinical, jsrt_masks
from spcxr_hf.errors import SpcxrError

OF_EACH_IMAGE = "that of each image"  # a licence
LARGEST_SHEET = 2**28  # bytes of a worksheet, unpacked
# Labels that follow from a class; the others are not known.
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


def read_covidx(root: Path) -> Rows:
    """COVIDx CXR-2 to CXR-4 (Wang et al. 2020): `{train,val,test}.txt` (patient, file, class, source), their folders.

    The patients of two sources may have one number, so the source's name is put before it.
    """
    files = [(root / f"{split}.txt", split) for split in ("train", "val", "test")]
    return stacked([_covidx_part(root, file, split) for file, split in files if file.is_file()])


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


def read_covid_radiography(root: Path) -> Rows:
    """COVID-19 Radiography Database (Chowdhury et al. 2020): a folder per class with `images/`, `masks/`, and an .xlsx.

    `source` has the URL of the .xlsx. A COVID-19 image is not known to have, or lack, a lung opacity.
    """
    parts = []
    for name in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        folder = root / name / "images" if (root / name / "images").is_dir() else root / name
        files = sorted(folder.glob("*.png"), key=lambda file: (len(file.name), file.name))
        origins = _covid_origins(root / f"{name}.metadata.xlsx")
        columns = {
            "id": [f"{name}/{file.name}" for file in files],
            "label": [name] * len(files),
            "masks": [_existing_masks({"lungs": root / name / "masks" / file.name}) or None for file in files],
            "source": [origins.get(file.stem.casefold()) for file in files],
        }
        parts.append(Rows(root, [str(file) for file in files], columns, _class_labels([name] * len(files))))
    return stacked(parts)


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


def read_kermany(root: Path) -> Rows:
    """Children's pneumonia (Kermany et al. 2018): `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    The file names hold the patient and bacterial or viral. Patients of `test` are numbered separately, so their names
    have `test/` before them.
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


def read_tuberculosis(root: Path, prefix: str, masks: Callable[[Path, str], dict[str, Path]]) -> Rows:
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
        "masks": [_existing_masks(masks(root, file.stem)) or None for file in files],
        "report": said,
        "report_path": [str(file) if file.is_file() else None for file in readings],
    }
    return Rows(root / "CXR_png", [str(file) for file in files], columns, {"Tuberculosis": label})


def _existing_masks(files: Mapping[str, Path]) -> list[dict]:
    return [{"name": name, "path": str(file), "rle": None} for name, file in files.items() if file.is_file()]


def montgomery_masks(root: Path, stem: str) -> dict[str, Path]:
    """Name -> file, for a mask of each lung."""
    return {f"{side} lung": root / "ManualMask" / f"{side}Mask" / f"{stem}.png" for side in ("left", "right")}


def shenzhen_masks(root: Path, stem: str) -> dict[str, Path]:
    """Of Stirenko et al. 2018, published beside the set: `mask/NAME_mask.png`."""
    return {"lungs": root / ("mask" if (root / "mask").is_dir() else "masks") / f"{stem}_mask.png"}


def read_jsrt(root: Path) -> Rows:
    """JSRT nodules (Shiraishi et al. 2000): `JPC{LN,NN}NNN.IMG`, or .png; masks of SCR (van Ginneken et al. 2006).

    `CLNDAT_EN.txt` and `CNNDAT_EN.TXT` have age, sex and the nodule. The raw .IMG has no header:
    `spcxr_hf.data.masks.convert_jsrt` makes PNG files of them, which are preferred where both are there.
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


def read_cohen(root: Path) -> Rows:
    """COVID-19 image data collection (Cohen et al. 2020): `metadata.csv`, `images/`; CT is left out.

    `finding` is a path as `Pneumonia/Viral/COVID-19`. COVID-19 is absent where there is no finding or another cause is
    named; it is missing for a plain `Pneumonia`, `todo` and `Unknown`.
    """
    file = root / "metadata.csv"
    rows = read_rows(file, ("patientid", "finding", "view", "modality", "filename"))
    modality, folders = texts(rows, "modality"), texts(rows, "folder")
    is_picture = [kind == "X-ray" and place in (None, "images") for kind, place in zip(modality, folders, strict=True)]
    rows = rows.filter(pa.array(is_picture))
    names = filled(rows, "filename", file)
    terms = [text.split("/") if text and text not in ("todo", "Unknown") else None for text in texts(rows, "finding")]
    labels = {name: _cohen_label(terms, name) for name in ("COVID-19", "Pneumonia", "Tuberculosis", "No Finding")}
    columns = {
        "id": names,
        "terms": terms,
        "licence": [text or OF_EACH_IMAGE for text in texts(rows, "license")],
    }
    notes = either(rows, "clinical_notes", "clinical notes")
    columns |= in_one_spelling(
        rows, patient="patientid", view="view", sex="sex", age="age", label="finding", report=notes, source="location"
    )
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
