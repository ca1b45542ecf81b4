"""Label spaces, and the policy for labels that are missing, uncertain or named otherwise.

* Missing is not negative: a label that a set did not give is null in a table and NaN in a matrix, never 0.
* Uncertain (-1, as CheXpert writes it) follows a rule: `ignore` makes it missing, `zero` absent, `one` present:
  U-Ignore, U-Zeroes and U-Ones of Irvin et al. 2019 (CheXpert), section 3.1.
* A label has one name in all sets. `canonical_name` maps spellings and true synonyms (`SYNONYMS`), and nothing else.

Kept apart, since one does not imply the other, or is a part of it: Lung Opacity, Airspace Opacity, Consolidation,
Infiltration and Pneumonia; Lung Lesion, Nodule, Mass and Nodule/Mass; Fracture, Rib Fracture and Clavicle Fracture;
Cardiomegaly and Enlarged Cardiomediastinum; Hernia and Hiatal Hernia; Normal and No Finding (a radiograph with a
pacemaker can have no finding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from spcxr_hf.errors import SpcxrError

Uncertain = Literal["ignore", "zero", "one"]

# Wang et al. 2017 (ChestX-ray8) with the six labels that the release of 2017 added, in the order of the release.
NIH14 = (
    "Atelectasis", "Cardiomegaly", "Pleural Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural Thickening", "Hernia",
)  # fmt: skip
# Irvin et al. 2019, table 1; MIMIC-CXR-JPG has the same.
CHEXPERT14 = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
# The five labels of CheXpert's competition (Irvin et al. 2019, section 4).
CHEXPERT5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
# Nguyen et al. 2022 (VinDr-CXR), table 1: 22 local and 6 global labels.
VINDR28 = (
    "Aortic Enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle Fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged Pulmonary Artery", "Interstitial Lung Disease", "Infiltration", "Lung Opacity",
    "Lung Cavity", "Lung Cyst", "Mediastinal Shift", "Nodule/Mass", "Pleural Effusion", "Pleural Thickening",
    "Pneumothorax", "Fibrosis", "Rib Fracture", "Other Lesion", "COPD", "Lung Tumor", "Pneumonia", "Tuberculosis",
    "Other Disease", "No Finding",
)  # fmt: skip
# Every name that the readers of public archives give.
COMMON = tuple(dict.fromkeys((*NIH14, *CHEXPERT14, *VINDR28, "COVID-19", "Viral Pneumonia", "Bacterial Pneumonia")))

SYNONYMS = {
    "Effusion": "Pleural Effusion",  # NIH
    "Pulmonary Edema": "Edema",  # PadChest
    "Pulmonary Fibrosis": "Fibrosis",  # VinDr, PadChest
    "Enlarged PA": "Enlarged Pulmonary Artery",  # VinDr
    "ILD": "Interstitial Lung Disease",  # VinDr
    "Other Diseases": "Other Disease",  # VinDr
    "No Findings": "No Finding",
    "COVID": "COVID-19",
    "COVID19": "COVID-19",
    "TB": "Tuberculosis",
}
LABELS_COLUMN = "labels"


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


_CANONICAL = {_key(name): name for name in COMMON} | {_key(name): known for name, known in SYNONYMS.items()}


def canonical_name(name: str) -> str:
    """The one name of a label: case, underscores and true synonyms are resolved; an unknown name stays as it is."""
    return _CANONICAL.get(_key(name), name.strip())


def resolve(values: Sequence | np.ndarray, uncertain: Uncertain = "ignore", name: str = "labels") -> np.ndarray:
    """Labels as a set writes them -> labels as they are trained on: the same shape, float32, 1, 0 or NaN.

    Args:
        values: Any shape: 1 present, 0 absent, -1 uncertain, NaN or None missing.
        uncertain: What becomes of -1: `ignore` missing, `zero` absent, `one` present.
        name: What to call them in messages.
    """
    if uncertain not in get_args(Uncertain):
        raise SpcxrError(f"uncertain must be {', '.join(get_args(Uncertain))}; got {uncertain!r}")
    try:
        numbers = np.array(values, dtype=np.float32)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise SpcxrError(f"{name}: labels must be 1, 0, -1 (uncertain) or missing ({error})") from error
    wrong = np.argwhere(~np.isin(numbers, (-1, 0, 1)) & ~np.isnan(numbers))
    if wrong.size:
        value = numbers[tuple(wrong[0])]
        raise SpcxrError(f"{name}: a label must be 1, 0, -1 (uncertain) or missing; row {wrong[0][0]} holds {value:g}")
    numbers[numbers == -1] = {"ignore": np.nan, "zero": 0.0, "one": 1.0}[uncertain]
    return numbers


def label_struct(labels: Mapping[str, Sequence | np.ndarray], uncertain: Uncertain = "ignore") -> pa.StructArray:
    """A column of labels: a struct with a field per label, null where it is missing.

    `labels` maps names, which become canonical, to (n,) values for `resolve`.
    """
    names = [canonical_name(name) for name in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise SpcxrError(f"two columns are the same label: {', '.join(twice)}" if twice else "there are no labels")
    columns = [resolve(values, uncertain, name) for name, values in labels.items()]
    # null, not NaN: what reads a cell of the struct would take NaN for true
    return pa.StructArray.from_arrays([pa.array(column, from_pandas=True) for column in columns], names)


# ---- cells as targets ------------------------------------------------------------------------------------------


def parse_classes(words: Sequence[str]) -> dict[str, list[str]]:
    """Class -> the labels that count as it, of words such as `normal` and `pneumonia=bacterial+viral`."""
    pairs = [word.partition("=") for word in words]
    classes = {name: labels.split("+") if labels else [name] for name, _, labels in pairs}
    if len(classes) < len(words):
        raise SpcxrError(f"a class appears twice among {' '.join(words)}")
    return classes


def names_in(cell: Any, multi_label: bool) -> list[str]:
    """The labels that one cell of a column names.

    Args:
        cell: A word or a number; a list of findings, which counts as `normal` where it is empty and `abnormal` else;
            with `multi_label` a list of the labels that hold, or a struct with a field for each; None or NaN: missing.
        multi_label: Whether labels may hold together.
    """
    if cell is None or cell != cell:  # NaN
        return []
    if multi_label and not isinstance(cell, list | dict):
        raise SpcxrError(f"multi_label needs lists or structs in the column of labels; it holds {cell!r}")
    if isinstance(cell, list) and not multi_label:
        return ["abnormal" if cell else "normal"]
    return [str(name) for name in cell] if multi_label else [str(cell)]


def targets_of(cell: Any, classes: Mapping[str, Sequence[str]], multi_label: bool) -> list[float]:
    """1, 0 or NaN (not known) for each class, of one cell as `names_in` takes it.

    Args:
        classes: Class -> the labels that count as it. A class of several labels holds where one of them does.
        multi_label: Whether labels may hold together; where not, a cell that names none of the classes is not known.
    """
    if cell is None or cell != cell:  # NaN
        return [math.nan] * len(classes)
    if isinstance(cell, dict):
        known = [[_known(cell.get(label), label) for label in labels] for labels in classes.values()]
        return [1.0 if any(values) else math.nan if None in values else 0.0 for values in known]
    names = names_in(cell, multi_label)
    targets = [float(any(label in names for label in labels)) for labels in classes.values()]
    return targets if multi_label or any(targets) else [math.nan] * len(classes)


def _known(value: Any, name: str) -> bool | None:
    """One field of a struct, as `resolve` takes it; None where it is missing or uncertain."""
    if value is None or value != value or value == -1:
        return None
    if value not in (0, 1):
        raise SpcxrError(f"{name}: a label must be 1, 0, -1 (uncertain) or missing; got {value!r}")
    return bool(value)


# ---- tables ----------------------------------------------------------------------------------------------------


def labels_of(tables: Any) -> list[str]:
    """The labels that any of the tables (as of `label_matrix`) has, in the order of their first appearance."""
    return list(dict.fromkeys(name for rows in _tables(tables) for name in _fields(rows)))


def label_matrix(tables: Any, names: Sequence[str] | None = None) -> np.ndarray:
    """The labels of a set, or of several one after another: what a set did not label is missing there.

    Args:
        tables: A `RadiographTable` or a `pyarrow.Table` with a struct column `labels`, or a sequence of them.
        names: The labels, in any spelling that `canonical_name` knows; None: all that any table has.

    Returns:
        (n, labels) float32: 1, 0 or NaN (missing), columns in the order of `names`.
    """
    parts = _tables(tables)
    known = labels_of(parts)
    wanted = known if names is None else [canonical_name(name) for name in names]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise SpcxrError(f"no set has the label {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
    if len(set(wanted)) < len(wanted):
        raise SpcxrError(f"two names are the same label: {', '.join(wanted)}")
    matrix = np.full((sum(rows.num_rows for rows in parts), len(wanted)), np.nan, dtype=np.float32)
    first = 0
    for rows in parts:
        fields = _fields(rows)
        for column, name in enumerate(wanted):
            if name in fields:
                matrix[first : first + rows.num_rows, column] = fields[name]
        first += rows.num_rows
    return matrix


def _tables(tables: Any) -> list[pa.Table]:
    several = tables if isinstance(tables, list | tuple) else [tables]
    return [table if isinstance(table, pa.Table) else table.rows for table in several]


def _fields(rows: pa.Table) -> dict[str, np.ndarray]:
    """Canonical name -> (n,) float32 of the column `labels`, NaN where a label, or the whole struct, is null."""
    if LABELS_COLUMN not in rows.column_names or not pa.types.is_struct(rows.schema.field(LABELS_COLUMN).type):
        return {}
    column = rows[LABELS_COLUMN].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column  # before pyarrow 17
    arrays = zip(column.type, column.flatten(), strict=True)  # `flatten` applies the struct's own nulls
    return {
        canonical_name(field.name): values.cast(pa.float32()).to_numpy(zero_copy_only=False) for field, values in arrays
    }
