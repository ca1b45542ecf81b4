"""Readers of the public archives with labels of many findings: mined from reports, or read by radiologists.

Each takes the folder of an archive in its published layout and gives `Rows`; `archives.ARCHIVES` names them all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spcxr_hf.data.archives.rows import Rows, either, filled, grouped_boxes, present, stacked
from spcxr_hf.data.labels import CHEXPERT14, NIH14, VINDR28, canonical_name
from spcxr_hf.data.manifests import (
    age_of,
    check_unique,
    in_one_spelling,
    numbers,
    read_rows,
    row_number,
    split_of,
    texts,
    view_of,
)
from spcxr_hf.data.masks import index_files
from spcxr_hf.errors import SpcxrError

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


# ---- text-mined sets ---------------------------------------------------------------------------------------------


def read_nih(root: Path) -> Rows:
    """NIH ChestX-ray14 (Wang et al. 2017): `Data_Entry_2017*.csv`, `images_*/images/*.png`, lists, boxes.

    Text-mined: a label that is not listed is taken as absent, as its authors do. `train_val_list.txt` is one list: its
    images are `train`, there is no official val.
    """
    file = max(root.glob("Data_Entry_2017*.csv"))  # _v2020 corrects the first
    rows = read_rows(file, ("Image Index", "Finding Labels", "Patient ID"))
    names = filled(rows, "Image Index", file)
    check_unique(names, file, "image")
    listed = [text.split("|") for text in filled(rows, "Finding Labels", file)]
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
    patients = filled(rows, "Patient ID", file)
    columns = {
        "id": names,
        "patient": patients,
        "study": [f"{one}_{visit}" for one, visit in zip(patients, texts(rows, "Follow-up #"), strict=True)],
        "split": [splits.get(name) for name in names],
        "terms": listed,
        "boxes": [boxes.get(name) for name in names],
    }
    sex = either(rows, "Patient Gender", "Patient Sex")
    columns |= in_one_spelling(rows, view="View Position", sex=sex, age="Patient Age")
    return Rows(file, [index.get(name, "") for name in names], columns, {key: present(terms, key) for key in known})


def _listed(root: Path, split: str) -> list[str]:
    file = root / {"train": "train_val_list.txt", "test": "test_list.txt"}[split]
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def _nih_boxes(root: Path) -> dict[str, list[dict]]:
    file = next(iter(sorted(root.glob("BBox_List_2017*.csv"))), None)
    if file is None:
        return {}
    rows = read_rows(file, ("Image Index", "Finding Label"))
    # its header calls the four numbers `Bbox [x`, `y`, `w`, `h]`
    sides = np.stack([numbers(rows, column, file) for column in rows.column_names[2:6]], axis=1)
    labels = ["Infiltration" if text == "Infiltrate" else text for text in texts(rows, "Finding Label")]
    return grouped_boxes(filled(rows, "Image Index", file), labels, sides[:, :2], sides[:, 2:])


def read_chexpert(root: Path) -> Rows:
    """CheXpert (Irvin et al. 2019), also `-small`: `train.csv`, `valid.csv`.

    A blank is missing, also beside a No Finding, and -1 uncertain.
    """
    files = [(root / f"{folder}.csv", split) for folder, split in (("train", "train"), ("valid", "val"))]
    return stacked([_chexpert_part(root, file, split) for file, split in files if file.is_file()])


def _chexpert_part(root: Path, file: Path, split: str) -> Rows:
    rows = read_rows(file, ("Path", "Frontal/Lateral", "AP/PA", *CHEXPERT14))
    names = []
    for row, text in enumerate(filled(rows, "Path", file)):
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
        "split": [split] * len(names),
        **in_one_spelling(rows, sex="Sex", age="Age"),
    }
    labels = {name: numbers(rows, name, file).astype(np.float32) for name in CHEXPERT14}
    return Rows(file, [f"{root}{os.sep}{name}" for name, _, _ in names], columns, labels)


def read_mimic(root: Path) -> Rows:
    """MIMIC-CXR-JPG (Johnson et al. 2019): `mimic-cxr-2.*-{metadata,chexpert,split}.csv[.gz]`, `files/pNN/pN/sN/*.jpg`.

    Labels belong to the study; a study without a row, or a blank cell, is missing. Reports are MIMIC-CXR's own:
    `report_path` is set where `files/pNN/pN/sN.txt` exists.
    """
    file, split_file, label_file = (_mimic_table(root, kind) for kind in ("metadata", "split", "chexpert"))
    rows = read_rows(file, ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    images, patients, studies = (filled(rows, name, file) for name in ("dicom_id", "subject_id", "study_id"))
    split_rows = read_rows(split_file, ("dicom_id", "split"))
    splits = dict(zip(texts(split_rows, "dicom_id"), texts(split_rows, "split"), strict=True))
    label_rows = read_rows(label_file, ("study_id", *CHEXPERT14))
    labelled = filled(label_rows, "study_id", label_file)
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


def read_padchest(root: Path) -> Rows:
    """PadChest (Bustos et al. 2020): `PADCHEST*.csv[.gz]`, 16-bit PNG in numbered folders, or in one.

    `terms` has the labels as they are; `labels` those of `PADCHEST_TERMS`. A row without labels is missing; one that
    says `exclude`, `unchanged` or `suboptimal study` is known for what it names, the rest is missing.
    """
    file = min(root.glob("PADCHEST*.csv*"))
    rows = read_rows(file, ("ImageID", "PatientID", "StudyID", "Projection", "Labels"))
    names = filled(rows, "ImageID", file)
    check_unique(names, file, "image")
    terms = [_padchest_terms(text) for text in texts(rows, "Labels")]
    index = index_files(root, suffixes=[".png"])
    dates, births = texts(rows, "StudyDate_DICOM"), texts(rows, "PatientBirth")
    columns = {
        "id": names,
        "age": [_years_between(born, date) for born, date in zip(births, dates, strict=True)],
        "terms": terms,
    }
    sex = either(rows, "PatientSex_DICOM", "PatientSex")
    columns |= in_one_spelling(rows, patient="PatientID", study="StudyID", view="Projection", sex=sex, report="Report")
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


def read_vindr(root: Path) -> Rows:
    """VinDr-CXR (Nguyen et al. 2022): `annotations/image_labels_*.csv`, `annotations_*.csv`, `{train,test}/*.dicom`.

    Three radiologists read each training image: present if most of them say so, absent if none does, otherwise
    uncertain. The test labels are a consensus. Patients are not published. Boxes are those of every reader.
    """
    place = root / "annotations" if (root / "annotations").is_dir() else root
    files = [(place / f"image_labels_{split}.csv", split) for split in ("train", "test")]
    return stacked([_vindr_part(root, file, split) for file, split in files if file.is_file()])


def _vindr_part(root: Path, file: Path, split: str) -> Rows:
    rows = read_rows(file, ("image_id",))
    found = {canonical_name(name): name for name in rows.column_names}
    absent = [name for name in VINDR28 if name not in found]
    if absent:
        raise SpcxrError(f"{file}: no column for {', '.join(absent)}; it is not VinDr-CXR's")
    read = filled(rows, "image_id", file)
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
    return grouped_boxes(filled(rows, "image_id", file), texts(rows, "class_name"), low, high - low)


def read_rsna(root: Path) -> Rows:
    """RSNA pneumonia detection 2018 (Shih et al. 2019): `stage_2_*.csv`, `stage_2_{train,test}_images/*.dcm`.

    `label` is the class of three; Lung Opacity is 1 where there is a box. Test images have no labels. `patientId` is
    one per image: the pictures are NIH's, and which of them are of one patient is not published.
    """
    file = root / "stage_2_train_labels.csv"
    rows = read_rows(file, ("patientId", "x", "y", "width", "height", "Target"))
    read = filled(rows, "patientId", file)
    targets = dict(zip(read, numbers(rows, "Target", file), strict=True))
    sides = [
        np.stack([numbers(rows, side, file) for side in pair], axis=1) for pair in (("x", "y"), ("width", "height"))
    ]
    boxes = grouped_boxes(read, ["Lung Opacity"] * len(read), *sides)
    classes: dict[str, str | None] = {}
    class_file = root / "stage_2_detailed_class_info.csv"
    if class_file.is_file():
        class_rows = read_rows(class_file, ("patientId", "class"))
        classes = dict(zip(filled(class_rows, "patientId", class_file), texts(class_rows, "class"), strict=True))
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
    return stacked(
        [train, Rows(file, [test[name] for name in own], {"id": own, "patient": own, "split": ["test"] * len(own)})]
    )


def read_siim(root: Path) -> Rows:
    """SIIM-ACR pneumothorax 2019: `train-rle.csv`, `dicom-images-{train,test}/*/*/*.dcm`.

    Masks are run-length codes (`rle_mask`), the empty one where there is no pneumothorax. Images of the folder that the
    table does not name, and those of test, are not labelled. Patients are named in the DICOM headers, which are not
    read.
    """
    file = root / "train-rle.csv"
    rows = read_rows(file, ("ImageId", "EncodedPixels"))
    codes: dict[str, list[str]] = {}
    for name, code in zip(filled(rows, "ImageId", file), filled(rows, "EncodedPixels", file), strict=True):
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
    return stacked(parts)
