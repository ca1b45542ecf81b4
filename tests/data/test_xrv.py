"""What torchxrayvision reads, against what is read here: its readers of archives on the same trees, and its objects."""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published_layouts import MAKERS

from spcxr_hf import SpcxrError
from spcxr_hf.data.archives.findings import PADCHEST_TERMS, PADCHEST_UNREAD
from spcxr_hf.data.archives.registry import ARCHIVES, read_archive
from spcxr_hf.data.archives.rows import Rows
from spcxr_hf.data.labels import CHEXPERT14, NIH14, canonical_name, label_matrix, labels_of
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, open_image


@pytest.fixture
def torchxrayvision():
    return pytest.importorskip("torchxrayvision", reason='needs torchxrayvision: pip install "spcxr-hf[xrv]"')


# ---- its readers, on small trees -----------------------------------------------------------------------------------

EVERY = {"views": ["*"], "unique_patients": False}  # by default one PA picture of each patient


def open_nih(datasets, folder):
    return [datasets.NIH_Dataset(str(folder), str(max(folder.glob("Data_Entry_2017*.csv"))), **EVERY)]


def open_chexpert(datasets, folder):
    files = [folder / "train.csv", folder / "valid.csv"]
    return [datasets.CheX_Dataset(str(folder), str(file), **EVERY) for file in files if file.is_file()]


def open_mimic(datasets, folder):
    labels, metadata = (str(min(folder.glob(f"mimic-cxr-2.*-{kind}.csv*"))) for kind in ("chexpert", "metadata"))
    return [datasets.MIMIC_Dataset(str(folder / "files"), labels, metadata, **EVERY)]


def open_padchest(datasets, folder):
    return [datasets.PC_Dataset(str(folder), str(min(folder.glob("PADCHEST*.csv*"))), **EVERY)]


def open_vindr(datasets, folder):
    place = folder / "annotations" if (folder / "annotations").is_dir() else folder
    tables = [(folder / split, place / f"annotations_{split}.csv") for split in ("train", "test")]
    return [datasets.VinBrain_Dataset(str(pictures), str(file)) for pictures, file in tables if file.is_file()]


def open_rsna(datasets, folder):
    pictures, labels = folder / "stage_2_train_images", folder / "stage_2_train_labels.csv"
    return [datasets.RSNA_Pneumonia_Dataset(str(pictures), str(labels), views=["*"], extension=".dcm")]


def open_siim(datasets, folder):
    return [datasets.SIIM_Pneumothorax_Dataset(str(folder / "dicom-images-train"), str(folder / "train-rle.csv"))]


def open_tuberculosis(datasets, folder):
    return [datasets.NLMTB_Dataset(str(folder))]


def open_cohen(datasets, folder):
    return [datasets.COVID19_Dataset(str(folder / "images"), str(folder / "metadata.csv"), views=["*"])]


READERS = {
    "nih": (open_nih, "Image Index"),
    "chexpert": (open_chexpert, "Path"),
    "mimic": (open_mimic, "dicom_id"),
    "padchest": (open_padchest, "ImageID"),
    "vindr": (open_vindr, "image_id"),
    "rsna": (open_rsna, "patientId"),
    "siim": (open_siim, "ImageId"),
    "montgomery": (open_tuberculosis, "fname"),
    "shenzhen": (open_tuberculosis, "fname"),
    "cohen": (open_cohen, "filename"),
}


# id -> label -> (read here, read by torchxrayvision), of all that differs.
BESIDE_NO_FINDING = dict.fromkeys(set(CHEXPERT14) - {"No Finding", "Support Devices"}, ("missing", "absent"))
BESIDE_UNCHANGED = PADCHEST_TERMS.keys() - {"No Finding", "Atelectasis"}
DIFFERENT = {
    "chexpert": {
        "train/patient00001/study1/view1_frontal.jpg": BESIDE_NO_FINDING,
        "valid/patient64541/study1/view1_frontal.jpg": BESIDE_NO_FINDING,
    },
    "padchest": {"a_2.png": dict.fromkeys(BESIDE_UNCHANGED, ("missing", "absent"))},
    "vindr": {"aa": {"Nodule/Mass": ("missing", "present")}},  # one reader of three
    "cohen": {"d.jpg": {"COVID-19": ("missing", "absent")}},  # a mere Pneumonia
}
LEFT_OUT = {
    "mimic": {"2a2b-3"},
    "padchest": {"b_1.png", "b_2.png"},
    "rsna": {"d"},
    "siim": {"1.2.z", "1.2.c"},
    "cohen": {"e.jpg"},
}


@pytest.mark.parametrize("name", READERS)
def test_both_read_an_archive_alike_but_where_it_is_said(name, tmp_path, torchxrayvision):
    root = MAKERS[name](tmp_path / name)
    own = read_archive(root, name)
    open_sets, id_column = READERS[name]
    sets = open_sets(torchxrayvision.datasets, root)
    theirs = {}  # of an image in several rows (SIIM's, one for each mask), all have its label
    for one in sets:
        names = [canonical_name(label) for label in one.pathologies]
        for file, values in zip(one.csv[id_column], one.labels, strict=True):
            theirs[f"{name}/{'/'.join(str(file).split('/')[-4:])}"] = dict(zip(names, values, strict=True))
    theirs = {image: labels for image, labels in theirs.items() if image in own.ids}
    assert {one.removeprefix(f"{name}/") for one in set(own.ids) - theirs.keys()} == LEFT_OUT.get(name, set())
    assert different(own, theirs) == DIFFERENT.get(name, {})


def different(own: RadiographTable, theirs: dict[str, dict]) -> dict[str, dict[str, tuple[str, str]]]:
    """id -> label -> both values where they are not the same, of the labels that both have."""
    names = [name for name in labels_of(own) if name in next(iter(theirs.values()))]
    assert names
    ours = dict(zip(own.ids, label_matrix(own, names), strict=True))
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for one, labels in theirs.items():
        for name, mine, other in zip(names, map(said, ours[one]), (said(labels[name]) for name in names), strict=True):
            if mine != other:
                found.setdefault(one.removeprefix(f"{own.name}/"), {})[name] = (mine, other)
    return found


def said(value: float) -> str:
    return {1: "present", 0: "absent"}.get(value, "missing")


@pytest.mark.parametrize(
    "name", ["nih", "chexpert", "mimic", "padchest", "rsna", "cohen"]
)  # the others name no patient
def test_both_tell_the_same_patients_apart(name, tmp_path, torchxrayvision):
    root = MAKERS[name](tmp_path / name)
    own = read_archive(root, name)
    patient_of = dict(zip(own.ids, own.column("patient"), strict=True))
    open_sets, id_column = READERS[name]
    tables = [one.csv for one in open_sets(torchxrayvision.datasets, root)]
    pairs = {
        (patient_of[f"{name}/{'/'.join(file.split('/')[-4:])}"], str(patient))
        for table in tables
        for file, patient in zip(table[id_column], table["patientid"], strict=True)
        if name != "cohen" or not file.endswith(".nii.gz")  # CT
    }
    ours, theirs = zip(*pairs, strict=True)
    assert len(set(ours)) == len(set(theirs)) == len(pairs)


# ---- its readers, on the published tables --------------------------------------------------------------------------
# It brings the tables of five archives as they were published: as many rows as there are, without the images.

# label -> terms that hold its name and do not mean it
PADCHEST_NAMESAKES = {
    "Pleural Effusion": {"pericardial effusion"},
    "Emphysema": {"subcutaneous emphysema"},
    "Nodule": {"pseudonodule"},
    "Tuberculosis": {"tuberculosis sequelae"},
}


def unpack(torchxrayvision, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = Path(torchxrayvision.datasets.datapath) / name
    is_zip = packed.suffix == ".zip"
    path.write_bytes(zipfile.ZipFile(packed).read(path.name) if is_zip else gzip.decompress(packed.read_bytes()))


@pytest.fixture
def published(torchxrayvision, tmp_path):
    def make(name: str, packed: str, table: str, pictures: str = "pictures") -> tuple[Rows, np.ndarray, dict]:
        """What is read here; for each row there the row here; label -> what is read there."""
        unpack(torchxrayvision, packed, tmp_path / table)
        (tmp_path / pictures).mkdir()
        own = ARCHIVES[name].read(tmp_path)
        open_sets, id_column = READERS[name]
        (theirs,) = open_sets(torchxrayvision.datasets, tmp_path)
        row_of = {one: row for row, one in enumerate(own.columns["id"])}
        files = theirs.csv[id_column]
        rows = np.array([row_of["/".join(file.split("/")[-4:])] for file in files])
        if "patientid" in theirs.csv:
            patients = {
                (own.columns["patient"][row], one) for row, one in zip(rows, theirs.csv["patientid"], strict=True)
            }
            ours, others = zip(*patients, strict=True)
            assert len(set(ours)) == len(set(others)) == len(patients) > 1000
        return own, rows, {canonical_name(one): theirs.labels[:, at] for at, one in enumerate(theirs.pathologies)}

    return make


@pytest.mark.slow
def test_the_table_of_nih(published):
    own, rows, theirs = published("nih", "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv")
    assert np.array_equal(np.sort(rows), np.arange(112_120))
    assert set(theirs) == set(NIH14)
    for name, values in theirs.items():
        np.testing.assert_array_equal(own.labels[name][rows], values)


@pytest.mark.slow
def test_the_table_of_chexpert(published):
    own, rows, theirs = published("chexpert", "chexpert_train.csv.gz", "train.csv", "train")
    assert np.array_equal(np.sort(rows), np.arange(223_414))
    assert set(theirs) == set(CHEXPERT14) - {"No Finding"}
    normal = own.labels["No Finding"][rows] == 1
    for name, values in theirs.items():
        mine = own.labels[name][rows]
        assert set(np.unique(mine[~np.isnan(mine)])) == {-1, 0, 1}
        mine = np.where(mine == -1, np.nan, mine)
        if name != "Support Devices":
            assert np.isnan(mine[normal & (mine != 0)]).all()
            mine = np.where(normal, 0, mine)
        np.testing.assert_array_equal(mine, values)


@pytest.mark.slow
def test_the_table_of_siim(published):
    packed = "siim-pneumothorax-train-rle.csv.gz"
    own, rows, theirs = published("siim", packed, "train-rle.csv", "dicom-images-train")
    assert len(rows) == 12_954 and set(rows) == set(range(12_047))  # a row for each mask
    np.testing.assert_array_equal(own.labels["Pneumothorax"][rows], theirs["Pneumothorax"])


@pytest.mark.slow
def test_the_table_of_rsna(published):
    packed = "kaggle_stage_2_train_labels.csv.zip"
    own, rows, theirs = published("rsna", packed, "stage_2_train_labels.csv", "stage_2_train_images")
    assert np.array_equal(np.sort(rows), np.arange(26_684))
    np.testing.assert_array_equal(own.labels["Lung Opacity"][rows], theirs["Lung Opacity"])


@pytest.mark.slow
def test_the_table_of_padchest(published):
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    own, rows, theirs = published("padchest", f"{name}.gz", name)
    assert len(own.paths) == 160_861 and len(set(rows)) == len(rows) > 158_000
    terms = own.columns["terms"]
    for label in own.labels.keys() & theirs.keys():
        mine, other = own.labels[label][rows], theirs[label]
        wrong = [set(terms[rows[row]]) for row in np.flatnonzero((mine != 1) & (other == 1))]
        assert all(not PADCHEST_NAMESAKES[label].isdisjoint(one) for one in wrong), label
        # Effusion is no part of its name
        overlooked = [terms[rows[row]] for row in np.flatnonzero((mine == 1) & (other == 0))]
        assert all("hydropneumothorax" in one for one in overlooked) and (not overlooked or label == "Pleural Effusion")
        left = np.isnan(mine) & (other == 0)
        unread = [terms[rows[row]] for row in np.flatnonzero(left)]
        assert all(one is None or not PADCHEST_UNREAD.isdisjoint(one) for one in unread)


# ---- its objects ---------------------------------------------------------------------------------------------------


class Xrv:
    """What torchxrayvision documents of its data sets."""

    def __init__(self, pictures):
        pandas = pytest.importorskip("pandas")
        self.pictures = pictures
        self.pathologies = ["Effusion", "Cardiomegaly"]
        self.labels = np.array([[1, np.nan], [0, 1]])
        columns = {
            "patientid": [7, np.nan],
            "view": ["PA", "UNKNOWN"],
            "sex_male": [True, False],
            "age_years": [50, 411],
        }
        self.csv = pandas.DataFrame(columns, index=[4, 9])  # a subset keeps the numbers of the whole

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, row):
        return {
            "img": (2 * self.pictures[row][None].astype(np.float32) - 1) * 1024,
            "lab": self.labels[row],
            "idx": row,
        }


def test_a_set_of_torchxrayvision():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = np.arange(256).reshape(16, 16) * 251 + 3
    table = read_set(Xrv([levels / 255, deep / 65535]))
    first, second = (np.asarray(open_image(cell, "x")) for cell in table.column("image"))
    assert np.array_equal(first, levels)
    assert np.abs(second.astype(int) - deep // 257).max() <= 1  # 16 bits are kept, and shown as 8 here
    assert Image.open(io.BytesIO(table.column("image")[1]["bytes"])).mode == "I;16"
    names = "Pleural Effusion", "Cardiomegaly"
    assert [tuple(row[name] for name in names) for row in table.column("labels")] == [(1, None), (0, 1)]
    assert table.column("patient") == ["Xrv/7", None]
    assert (table.column("view"), table.column("sex"), table.column("age")) == (["PA", None], ["M", "F"], [50, None])


def test_a_set_of_torchxrayvision_with_other_values():
    with pytest.raises(SpcxrError, match="Xrv: row 1: values from .* not within -1024..1024"):
        read_set(Xrv([np.zeros((4, 4)), np.full((4, 4), 3)]))
    with pytest.raises(SpcxrError, match="Xrv: no rows"):
        read_set(Xrv([]))
