"""Sets as torchxrayvision reads them (the extra `xrv`): an object of it as a table, and its readers of the archives.

    read_torchxrayvision  one of its data set objects, pictures and all
    as_torchxrayvision    a table of `registry` -> READERS -> its class on that folder -> its rows and labels

Its classes say which pictures there are, and their labels; splits, masks, boxes, reports, patients in one spelling and
where a file lies stay those of `spcxr_hf.data.archives.registry`. Where the two differ on the same folder:

| archive | what torchxrayvision reads otherwise |
|---|---|
| nih | no label No Finding |
| chexpert, mimic | beside a No Finding, blank labels (in CheXpert all but Support Devices) are absent: here missing |
| | no label No Finding; of MIMIC no images of studies without labels |
| padchest | a label is a part of the terms' text (Nodule is in `pseudonodule`, Effusion in `pericardial effusion`): \
here it is a whole term |
| | what `unchanged` and the like do not name is absent: here missing |
| | 28 labels; no rows without terms or year of birth, none of 21 files that are broken |
| vindr | present where any reader drew a box: here where most say so, and uncertain where some do; 14 labels |
| rsna | Pneumonia too, the same as Lung Opacity; views, of its own list; no test images |
| siim | no images that the table does not name |
| cohen | a label for each part of `finding`, absent where it is not named: here COVID-19 is missing beside a mere |
| | Pneumonia; no `todo` and `Unknown` |
| montgomery, shenzhen | nothing |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from spcxr_hf.data.labels import LABELS_COLUMN, label_struct
from spcxr_hf.data.manifests import IMAGE, OLDEST, in_schema, view_of
from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError, one_line

EVERY = {"views": ["*"], "unique_patients": False}  # by default one PA picture of each patient

# ---- its readers of archives -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """How torchxrayvision reads an archive.

    Attributes:
        open: Its module `datasets` and the archive's folder -> its objects.
        id_column: Of their `csv`: what ends as the image's name does.
    """

    open: Callable[[Any, Path], Sequence[Any]]
    id_column: str


def as_torchxrayvision(table: RadiographTable, archive: str, folder: Path) -> RadiographTable:
    """The rows of an archive's table that torchxrayvision reads too, with its labels.

    Args:
        table: What `spcxr_hf.data.archives.registry.read_archive` reads there.
        archive: A key of READERS.
        folder: Where the archive's tables lie.

    Raises:
        SpcxrError: torchxrayvision is not installed, has no reader of this archive, cannot read it, or reads none of
            the images.
    """
    reader = READERS.get(archive)
    if reader is None:
        raise SpcxrError(f"{folder}: torchxrayvision has no reader of {archive}; it has those of {', '.join(READERS)}")
    datasets = _import_datasets(folder)
    with _numpy_seed_kept():
        try:
            objects = reader.open(datasets, folder)
        except Exception as error:  # many types, by what the archive's tables lack
            cause = f"{type(error).__name__}: {one_line(error)}"
            raise SpcxrError(f"{folder}: torchxrayvision cannot read it ({cause})") from error
    # Pictures of which several rows tell (SIIM's, one for each mask) have one label in all of them: the last will do.
    names = [f"{archive}/{_short(name)}" for one in objects for name in one.csv[reader.id_column]]
    row_of = {name: row for row, name in enumerate(names)}
    kept = [row for row, name in enumerate(table.ids) if name in row_of]
    if not kept:
        raise SpcxrError(f"{folder}: torchxrayvision reads none of its {len(table)} images")
    theirs = np.array([row_of[table.ids[row]] for row in kept])
    labels = np.concatenate([np.asarray(one.labels, dtype=np.float64) for one in objects])[theirs]
    views = [view for one in objects for view in _words(one.csv, "view", len(one))]
    return _with_theirs(
        table.rows.take(kept), table.name, objects[0].pathologies, labels, [views[row] for row in theirs]
    )


def _short(name: str) -> str:
    """CheXpert-v1.0-small/train/patient1/study1/view1.jpg -> train/patient1/study1/view1.jpg."""
    return "/".join(str(name).split("/")[-4:])


def _with_theirs(
    rows: pa.Table, name: str, pathologies: Sequence[str], labels: np.ndarray, views: Sequence[str | None]
) -> RadiographTable:
    """Rows with these labels (n, p), and with views where the archive's own tables do not tell them."""
    own = rows["view"].to_pylist()
    columns = {
        LABELS_COLUMN: label_struct({word: labels[:, at] for at, word in enumerate(pathologies)}),
        "view": pa.array([mine or view_of(theirs) for mine, theirs in zip(own, views, strict=True)], pa.string()),
    }
    for column, values in columns.items():
        rows = rows.set_column(rows.column_names.index(column), column, values)
    return RadiographTable(rows, name)


def _import_datasets(folder: Path) -> Any:
    try:
        from torchxrayvision import datasets
    except ImportError as error:
        raise SpcxrError(f'{folder}: torchxrayvision is missing: pip install "spcxr-hf[xrv]"') from error
    return datasets


@contextmanager
def _numpy_seed_kept() -> Iterator[None]:
    """Its classes seed NumPy's global generator, which somebody else may be drawing from."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _open_nih(datasets: Any, folder: Path) -> list[Any]:
    return [datasets.NIH_Dataset(str(folder), str(max(folder.glob("Data_Entry_2017*.csv"))), **EVERY)]


def _open_chexpert(datasets: Any, folder: Path) -> list[Any]:
    files = [folder / "train.csv", folder / "valid.csv"]
    return [datasets.CheX_Dataset(str(folder), str(file), **EVERY) for file in files if file.is_file()]


def _open_mimic(datasets: Any, folder: Path) -> list[Any]:
    labels, metadata = (str(min(folder.glob(f"mimic-cxr-2.*-{kind}.csv*"))) for kind in ("chexpert", "metadata"))
    return [datasets.MIMIC_Dataset(str(folder / "files"), labels, metadata, **EVERY)]


def _open_padchest(datasets: Any, folder: Path) -> list[Any]:
    return [datasets.PC_Dataset(str(folder), str(min(folder.glob("PADCHEST*.csv*"))), **EVERY)]


def _open_vindr(datasets: Any, folder: Path) -> list[Any]:
    place = folder / "annotations" if (folder / "annotations").is_dir() else folder
    tables = [(folder / split, place / f"annotations_{split}.csv") for split in ("train", "test")]
    return [datasets.VinBrain_Dataset(str(pictures), str(file)) for pictures, file in tables if file.is_file()]


def _open_rsna(datasets: Any, folder: Path) -> list[Any]:
    pictures, labels = folder / "stage_2_train_images", folder / "stage_2_train_labels.csv"
    return [datasets.RSNA_Pneumonia_Dataset(str(pictures), str(labels), views=["*"], extension=".dcm")]


def _open_siim(datasets: Any, folder: Path) -> list[Any]:
    return [datasets.SIIM_Pneumothorax_Dataset(str(folder / "dicom-images-train"), str(folder / "train-rle.csv"))]


def _open_tuberculosis(datasets: Any, folder: Path) -> list[Any]:
    return [datasets.NLMTB_Dataset(str(folder))]


def _open_cohen(datasets: Any, folder: Path) -> list[Any]:
    return [datasets.COVID19_Dataset(str(folder / "images"), str(folder / "metadata.csv"), views=["*"])]


READERS: Mapping[str, Reader] = {
    "nih": Reader(_open_nih, "Image Index"),
    "chexpert": Reader(_open_chexpert, "Path"),
    "mimic": Reader(_open_mimic, "dicom_id"),
    "padchest": Reader(_open_padchest, "ImageID"),
    "vindr": Reader(_open_vindr, "image_id"),
    "rsna": Reader(_open_rsna, "patientId"),
    "siim": Reader(_open_siim, "ImageId"),
    "montgomery": Reader(_open_tuberculosis, "fname"),
    "shenzhen": Reader(_open_tuberculosis, "fname"),
    "cohen": Reader(_open_cohen, "filename"),
}


# ---- its objects -------------------------------------------------------------------------------------------------


def is_torchxrayvision(source: Any) -> bool:
    """Whether it has what every data set of torchxrayvision has."""
    return all(hasattr(source, name) for name in ("pathologies", "labels", "csv", "__getitem__", "__len__"))


def read_torchxrayvision(dataset: Any) -> RadiographTable:
    """Read a data set object of torchxrayvision (the extra `xrv`): any of its archives, merged, filtered or a subset.

    Its objects say what a picture is and not where its file lies, so every picture is read once and kept as a PNG in
    memory: grey, 8 bits, or 16 where 8 would lose something. For sets that do not fit, give the archive's folder to
    `read_set`. Its `transform` must keep to its range.

    Args:
        dataset: `labels` (n, p) of 1, 0 and NaN, `pathologies` p names, `csv` n rows of which `patientid`, `view`,
            `sex_male` and `age_years` are read, and `dataset[row]["img"]` (1, H, W) in -1024..1024.

    Raises:
        SpcxrError: it is empty, a picture cannot be read, or its values lie outside -1024..1024.
    """
    name, count = type(dataset).__name__, len(dataset)
    if not count:
        raise SpcxrError(f"{name}: no rows")
    table = dataset.csv.reset_index(drop=True)
    cells = [{"bytes": _png(dataset, row, f"{name}: row {row}"), "path": None} for row in range(count)]
    labels = np.asarray(dataset.labels, dtype=np.float64)
    columns = {
        "id": [f"{name}/{row}" for row in range(count)],
        "patient": [value and f"{name}/{value}" for value in _words(table, "patientid", count)],
        "view": [view_of(value) for value in _words(table, "view", count)],
        "sex": [{1: "M", 0: "F"}.get(value) for value in _column(table, "sex_male", count)],
        "age": [age if 0 <= age <= OLDEST else None for age in _column(table, "age_years", count)],
        "source": name,
        LABELS_COLUMN: label_struct({word: labels[:, at] for at, word in enumerate(dataset.pathologies)}),
    }
    return RadiographTable(in_schema(pa.array(cells, IMAGE), columns), name)


def _column(table: Any, name: str, count: int) -> list[Any]:
    """A column of its metadata, NaN where a value or the column is missing."""
    return table[name].tolist() if name in table.columns else [float("nan")] * count


def _words(table: Any, name: str, count: int) -> list[str | None]:
    """A column as text; whole numbers that pandas made floats, for want of another null, are whole again."""
    values = [None if value is None or value != value else value for value in _column(table, name, count)]
    whole = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [None if value is None else str(value) for value in whole]


def _png(dataset: Any, row: int, name: str) -> bytes:
    try:
        pixels = np.asarray(dataset[row]["img"], dtype=np.float64)
    except Exception as error:  # many types, by archive and decoder
        raise SpcxrError(
            f"{name}: torchxrayvision cannot read it ({type(error).__name__}: {one_line(error)})"
        ) from error
    unit = (pixels.reshape(pixels.shape[-2:]) / 1024 + 1) / 2
    if not (unit.min() > -1e-3 and unit.max() < 1 + 1e-3):
        raise SpcxrError(f"{name}: values from {pixels.min():.6g} to {pixels.max():.6g}, not within -1024..1024")
    eight = unit.clip(0, 1) * 255
    is_eight = np.abs(eight - np.rint(eight)).max() < 1e-3
    values = np.rint(eight).astype(np.uint8) if is_eight else np.rint(unit.clip(0, 1) * 65535).astype(np.uint16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
