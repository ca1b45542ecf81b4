"""The audit of a set: the page can be parsed and holds the facts, the numbers are right, a broken file ends nothing."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spcxr_hf import files
from spcxr_hf.data.table import RadiographTable, read_table
from spcxr_hf.errors import SpcxrError
from spcxr_hf.inference.pipeline import table_of
from spcxr_hf.quality.audit import audit
from tests.images.test_dicom import dataset
from tests.images.test_plausibility import chest
from tests.made_up import STRUCT, encoded, write_set
from tests.quality.test_duplicates import crop, radiograph

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Text, pictures and table rows of a page; every tag must be closed in its order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.pictures, self.rows, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            source = dict(attributes)["src"]
            assert source.startswith("data:image/png;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def evil(seed: int) -> str:
    return f'<script>alert("{seed}")</script>'


@pytest.fixture(scope="module")
def table() -> RadiographTable:
    jpeg = io.BytesIO()
    crop(radiograph(0)).save(jpeg, "JPEG", quality=60)
    deep = io.BytesIO()
    Image.fromarray(np.asarray(radiograph(3)).astype(np.uint16) * 257).save(deep, "PNG")
    cells = [encoded(np.asarray(radiograph(seed))) for seed in range(3)]
    cells += [{"bytes": jpeg.getvalue(), "path": None}, {"bytes": deep.getvalue(), "path": None}]
    cells += [{"bytes": cells[0]["bytes"][:300], "path": None}, {"bytes": None, "path": "gone.png"}]
    cells += [{"bytes": None, "path": None}]
    columns = {
        "id": [evil(0), "one", "two", "copy", "deep", "cut", "gone", "empty"],
        "split": ["train", "train", "train", "test", "test", "test", "train", None],
        "patient": ["a", "b", None, "c", "b", None, None, None],
        "label": ["normal", "viral", None, "normal", "<b>viral", "normal", "viral", "normal"],
        "findings": pa.array([[], ["x"], ["y", "x"], None, [], [], [], []], pa.list_(pa.string())),
    }
    return RadiographTable(pa.table({"image": pa.array(cells, STRUCT), **columns}), "made & up")


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory):
    output = tmp_path_factory.mktemp("audit") / "inner"
    audit(table, output, split_column="split", label_columns=["label", "findings"])
    return output


@pytest.fixture(scope="module")
def numbers(folder) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "audit.html").read_text(encoding="utf-8"))


def test_counts(numbers):
    assert (numbers["set"], numbers["images"], numbers["readable"]) == ("made & up", 8, 5)
    assert (numbers["patients"], numbers["images_without_patient"]) == (3, 4)
    assert numbers["splits"] == {"train": 4, "test": 3, "(missing)": 1}
    assert numbers["labels"]["label"]["normal"] == {"train": 1, "test": 2, "(none)": 1}
    assert numbers["labels"]["findings"]["x, y"] == {"train": 1, "test": 0, "(none)": 0}
    assert numbers["labels"]["findings"]["(empty list)"]["test"] == 2
    assert numbers["missing"] == {"image": 0, "id": 0, "split": 1, "patient": 4, "label": 1, "findings": 1}
    assert numbers["sizes"] == {"160x160": 4, "141x139": 1}
    assert numbers["width"] == {"smallest": 141, "median": 160, "largest": 160}
    assert numbers["modes"] == {"PNG L": 3, "JPEG L": 1, "PNG I;16": 1}


def test_broken_images_are_listed_with_their_cause(numbers, page):
    broken = {one["id"]: one["cause"] for one in numbers["broken"]}
    assert list(broken) == ["cut", "gone", "empty"]
    assert "damaged or cut short" in broken["cut"]
    assert "gone.png" in broken["gone"]
    assert "no image in this row" in broken["empty"]
    assert ["cut", broken["cut"]] in page.rows


def test_duplicates_and_leaks(numbers, page):
    (pair,) = numbers["duplicates"]
    assert {pair["first"], pair["second"]} == {evil(0), "copy"}
    assert (pair["first_split"], pair["second_split"], pair["mirrored"]) == ("train", "test", False)
    assert numbers["leaks"]["images"] == [pair]
    assert numbers["leaks"]["patients"] == [{"patient": "b", "ids": {"train": ["one"], "test": ["deep"]}}]
    assert ["patients on different sides of the split", "1"] in page.rows
    assert any(": a leak" in text for text in page.text)


def test_odd_files_are_rows_like_others(tmp_path):
    """A DICOM whose preamble is the header of a huge TIFF, and a name of 250 bytes."""
    pytest.importorskip("pydicom")
    folder = tmp_path / "set"
    folder.mkdir()
    buffer = io.BytesIO()
    deep = chest(80, 80).astype(np.uint16) * 16
    dataset(deep, 12).save_as(buffer, enforce_file_format=True)
    head = b"II*\0\x08\0\0\0\x02\0"  # width and height, 32 bits each
    for tag in (256, 257):
        head += tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + (500_000).to_bytes(4, "little")
    (folder / "preamble.dcm").write_bytes(head.ljust(128, b"\0") + buffer.getvalue()[128:])
    (folder / ("n" * 246 + ".png")).write_bytes(encoded(chest(90, 80))["bytes"])
    numbers = audit(read_table(folder), tmp_path / "audit")
    assert numbers["modes"] == {"DICOM": 1, "PNG L": 1}
    assert numbers["broken"] == []


def test_grey_values_are_those_of_numpy(numbers):
    pixels = np.concatenate([np.asarray(radiograph(seed)).ravel() for seed in range(3)]) / 255
    grey = numbers["grey"]["train"]
    assert grey["mean"] == pytest.approx(pixels.mean(), abs=1e-4)
    assert grey["std"] == pytest.approx(pixels.std(), abs=1e-4)
    assert sum(grey["histogram"]) == pytest.approx(1, abs=1e-3)
    assert "(none)" not in numbers["grey"]  # its one image is broken


def test_the_page_holds_the_facts_and_its_pictures(page, folder):
    assert "Audit of made & up" in page.text
    assert ["images", "8"] in page.rows and ["broken", "3"] in page.rows
    assert ["normal", "1", "2", "1", "4"] in page.rows  # label, train, test, no split, all
    assert ["PNG I;16", "1"] in page.rows
    sheets = [picture.size for picture in page.pictures if picture.mode == "L"]
    assert (192, 96) in sheets  # the pair
    assert any("label = viral, train" in text for text in page.text)
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "audit.json"]


def test_a_split_column_of_another_name_is_named(table, tmp_path):
    rows = RadiographTable(table.rows.append_column("kept", pa.array([True] * 5 + [False] * 3)), "made")
    numbers = audit(rows, tmp_path, split_column="kept", label_columns=["label"], images=False)
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert numbers["split_column"] == "kept"
    assert ["kept", "images"] in page.rows and ["label", "kept = True", "kept = False", "all"] in page.rows
    assert any("label = viral, kept = True" in text for text in page.text)
    assert ["width", "141", "160", "160"] in page.rows  # the median, too, without decimals


def test_several_parquet_files_by_a_pattern(tmp_path):
    for name in ("a", "b"):
        write_set(tmp_path / f"{name}.parquet", ["train", "val"])
    assert len(table_of([str(tmp_path / "*.parquet")])) == 4
    assert len(table_of([str(tmp_path / "a.parquet")])) == 2
    rows = read_table(tmp_path / "a.parquet").rows.select(["image"]).append_column("id", [[1, 2]])
    pq.write_table(rows, tmp_path / "c.parquet")
    with pytest.raises(SpcxrError, match="the files do not fit together"):
        table_of([str(tmp_path / "*.parquet")])


def test_no_value_becomes_mark_up(page, folder):
    text = (folder / "audit.html").read_text(encoding="utf-8")
    assert "script" not in page.tags and "b" not in page.tags
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "http://" not in text and "https://" not in text
    assert "<footer>Research use only, not for clinical use.</footer>" in text


def test_dark_and_negative_images_are_counted(tmp_path):
    grey = chest()
    cells = [encoded(pixels) for pixels in (grey, 255 - grey, (grey.astype(np.uint16) << 4), grey.astype(np.uint16))]
    rows = pa.table({"image": pa.array(cells, STRUCT), "id": ["right", "negative", "12 bits", "8 of 16 bits"]})
    numbers = audit(RadiographTable(rows, "made"), tmp_path, images=False)
    assert numbers["warnings"] == {
        "probably a photographic negative": {"images": 1, "first": "negative"},
        "nearly black": {"images": 2, "first": "12 bits"},
    }
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert ["nearly black", "2", "12 bits"] in page.rows


def test_without_matplotlib(table, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    audit(table, tmp_path, images=False)
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert any("Histograms need matplotlib" in text for text in page.text)
    assert ["pairs of nearly equal images", "not looked for"] in page.rows


def test_a_folder_of_pictures_without_columns(tmp_path):
    (tmp_path / "set").mkdir()
    for seed in range(2):
        radiograph(seed).save(tmp_path / "set" / f"{seed}.png")
    (tmp_path / "set" / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    numbers = audit(read_table(tmp_path / "set"), tmp_path / "out", workers=1)
    assert (numbers["images"], numbers["readable"], numbers["duplicates"]) == (3, 2, [])
    assert numbers["broken"][0]["id"] == "broken.jpg"
    assert Page((tmp_path / "out" / "audit.html").read_text(encoding="utf-8")).pictures


def test_nothing_of_a_dicom_header_is_written(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.98989898"
    dataset.PatientName, dataset.PatientID, dataset.StudyDate = "MARKED^NAME", "MARKED-ID", "19010203"
    dataset.Rows = dataset.Columns = 160
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = np.asarray(radiograph(0)).tobytes()
    (tmp_path / "set").mkdir()
    dataset.save_as(tmp_path / "set" / "a.dcm", enforce_file_format=True)
    whole = (tmp_path / "set" / "a.dcm").read_bytes()
    (tmp_path / "set" / "b.dcm").write_bytes(whole[: len(whole) // 2])
    numbers = audit(read_table(tmp_path / "set"), tmp_path / "out")
    assert numbers["modes"] == {"DICOM": 1} and len(numbers["broken"]) == 1
    for path in (tmp_path / "out").iterdir():
        assert not any(mark in path.read_bytes() for mark in (b"MARKED", b"19010203", b"98989898"))


def test_workers_are_bounded(table, tmp_path, monkeypatch):
    asked = []

    class Pool(files.ThreadPoolExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(files, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64), raising=False)
    audit(table, tmp_path, images=False)
    audit(table, tmp_path, images=False, workers=3)
    assert asked == [8, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_column": "colour"}, "no column 'colour'"),
        ({"label_columns": ["label", "colour"]}, "no column 'colour'"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_refusals(table, tmp_path, settings, message):
    with pytest.raises(SpcxrError, match=message):
        audit(table, tmp_path / "out", **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(SpcxrError, match=r"file/audit\.json: cannot be written"):
        audit(table, tmp_path / "file")
    with pytest.raises(SpcxrError, match="no rows to audit"):
        audit(RadiographTable(table.rows.slice(0, 0), "none"), tmp_path / "out")


def test_a_broken_image_ends_the_audit_where_that_is_asked_for(tmp_path):
    rows = read_table(write_set(tmp_path / "set.parquet", ["train", "val"], unreadable=["val"]))
    with pytest.raises(SpcxrError, match=r"set\.parquet: row 1"):
        audit(rows, tmp_path / "page", on_error="stop")
    assert not (tmp_path / "page").exists()
    with pytest.raises(SpcxrError, match="on_error must be stop or skip; got 'never'"):
        audit(rows, tmp_path / "page", on_error="never")
