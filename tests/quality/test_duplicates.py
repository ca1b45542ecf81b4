"""Leaks: every kind of copy is found, what is merely alike is not, patients, between sets, refusals."""

import io
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spcxr_hf.data.sets import read_ids
from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError
from spcxr_hf.quality import duplicates
from spcxr_hf.quality.audit import audit
from spcxr_hf.quality.duplicates import (
    LeakError,
    check_leaks,
    copies_to_leave_out,
    find_duplicates,
    find_patient_leaks,
    read_thumbnails,
    refuse_leaks,
    thumbnail,
)
from tests.made_up import STRUCT, encoded, picture
from training_scripts.benchmarks import check_leaks as check_leaks_script

SIZE = 160


def radiograph(seed: int) -> Image.Image:
    """A made-up chest of `made_up.picture` with structure of its own at every scale, as ribs and vessels are."""
    generator = np.random.default_rng(1000 + seed)
    grey = picture(seed, SIZE)[0].astype(np.float64)
    for cells, strength in ((6, 25), (12, 20), (24, 15), (40, 15)):
        noise = Image.fromarray(generator.normal(0, strength, (cells, cells)).astype(np.float32))
        grey += np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def crop(image: Image.Image, left=0.04, top=0.11, right=0.92, bottom=0.98) -> Image.Image:
    return image.crop((round(left * SIZE), round(top * SIZE), round(right * SIZE), round(bottom * SIZE)))


def reencode(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.resize((96, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("L")


def brighten(image: Image.Image) -> Image.Image:
    grey = np.asarray(image) / 255.0
    return Image.fromarray(((0.75 * grey**1.4 + 0.2).clip(0, 1) * 255).astype(np.uint8))


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


COPIES = {
    "itself": lambda image: image,
    "crop": crop,
    "centre": lambda image: crop(image, 0.1, 0.1, 0.9, 0.9),
    "reencoded": reencode,
    "brightness": brighten,
    "all": lambda image: reencode(brighten(crop(image))),
}


@pytest.fixture(scope="module")
def others() -> np.ndarray:
    """Thumbnails of 60 different radiographs."""
    return np.stack([thumbnail(radiograph(seed)) for seed in range(60)])


def stack(others: np.ndarray, images: list[Image.Image]) -> np.ndarray:
    return np.concatenate([others, *[thumbnail(image)[None] for image in images]])


def table(images, name: str = "made-up", **columns) -> RadiographTable:
    cells = [encoded(np.asarray(image)) if isinstance(image, Image.Image) else image for image in images]
    return RadiographTable(pa.table({"image": pa.array(cells, STRUCT), **columns}), name)


# Near-duplicates


def test_different_images_are_not_paired(others):
    assert find_duplicates(others) == []


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_and_nothing_else(others, kind):
    sources = (3, 17, 40, 59)
    pairs = find_duplicates(stack(others, [COPIES[kind](radiograph(seed)) for seed in sources]))
    assert sorted((pair.first, pair.second) for pair in pairs) == [(seed, 60 + n) for n, seed in enumerate(sources)]
    assert all(duplicates.SAME_IMAGE < pair.similarity <= 1.0001 and not pair.flipped for pair in pairs)
    assert [pair.similarity for pair in pairs] == sorted((pair.similarity for pair in pairs), reverse=True)


def test_a_mirrored_copy_is_found_where_asked_for(others):
    thumbnails = stack(others, [mirror(crop(radiograph(5)))])
    assert find_duplicates(thumbnails) == []
    (pair,) = find_duplicates(thumbnails, flips=True)
    assert (pair.first, pair.second, pair.flipped) == (5, 60, True)


def test_only_pairs_on_different_sides(others):
    thumbnails = stack(others, [radiograph(0), radiograph(59)])
    sides = ["train"] * 30 + ["test"] * 30 + ["train", "train"]
    pairs = find_duplicates(thumbnails, sides=sides)
    assert [(pair.first, pair.second) for pair in pairs] == [(59, 61)]
    assert find_duplicates(thumbnails, sides=["train"] * 62) == []


def test_the_size_of_the_blocks_changes_nothing(others, monkeypatch):
    thumbnails = stack(others, [crop(radiograph(seed)) for seed in (1, 30, 31)])
    whole = find_duplicates(thumbnails)
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "QUERIES", 5)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 2)
    parts = find_duplicates(thumbnails)
    assert [pair[:2] for pair in parts] == [pair[:2] for pair in whole]
    assert [pair.similarity for pair in parts] == pytest.approx([pair.similarity for pair in whole], abs=1e-4)


def test_images_without_contrast_equal_nothing():
    flat = np.full((5, 64, 64), 90, dtype=np.uint8)
    assert find_duplicates(flat) == []
    assert find_duplicates(flat[:0]) == []


def test_many_copies_of_one_image_come_to_an_end(monkeypatch):
    monkeypatch.setattr(duplicates, "PER_QUERY", 3)
    copies = np.repeat(thumbnail(radiograph(0))[None], 150, axis=0)
    start = time.perf_counter()
    pairs = find_duplicates(copies)
    assert {row for pair in pairs for row in pair[:2]} == set(range(150))  # each is in some pair
    assert len(pairs) <= 3 * 150
    assert time.perf_counter() - start < 20


def test_correlation_is_that_of_numpy():
    """The windows are resampled, and correlated, as an independent implementation does it."""
    generator = np.random.default_rng(0)
    a, b = (torch.from_numpy(generator.normal(size=(1, 16, 16))).float() for _ in range(2))
    left, right, top, bottom = window = (0.125, 0.9, 0.1, 0.8)
    places = [(np.arange(16) + 0.5) / 16 * (end - start) * 16 + start * 16 - 0.5
              for start, end in ((left, right), (top, bottom))]  # fmt: skip
    rows = np.stack([np.interp(places[0], np.arange(16), line) for line in b[0].numpy()])
    seen = np.stack([np.interp(places[1], np.arange(16), line) for line in rows.T]).T
    centred = torch.nn.functional.normalize((a - a.mean()).flatten(1), dim=1)
    expected = np.corrcoef(a.flatten().numpy(), seen.flatten())[0, 1]
    assert duplicates._correlation(centred, b, torch.tensor([window])).item() == pytest.approx(expected, abs=1e-5)


def test_descriptors_of_windows_are_cosine_transforms():
    """Of a wave that is a basis function of a window, that window's spectrum has one entry."""
    x = (np.arange(64) + 0.5) / 64
    left, right = 0.125, 0.875  # whole pixels
    wave = np.cos(np.pi * 3 * (x - left) / (right - left))
    spectrum = duplicates._cosines(left, right).numpy() @ wave
    assert np.abs(spectrum).argmax() == 3
    assert np.abs(np.delete(spectrum, 3)).max() < 1e-3 * abs(spectrum[3])


@pytest.mark.parametrize(
    ("thumbnails", "sides", "message"),
    [
        (np.zeros((2, 32, 32), np.uint8), None, r"must be \(n, 64, 64\) uint8; got \(2, 32, 32\)"),
        (np.zeros((2, 64, 64), np.float32), None, "float32"),
        (np.zeros((2, 64, 64), np.uint8), ["a"], "2 thumbnails, but 1 sides"),
    ],
)
def test_refused_thumbnails(thumbnails, sides, message):
    with pytest.raises(SpcxrError, match=message):
        find_duplicates(thumbnails, sides=sides)


def test_a_16_bit_thumbnail_is_that_of_8_bits():
    grey = np.asarray(radiograph(0))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(thumbnail(deep), thumbnail(Image.fromarray(grey)))


# Sides and reports


def test_patients():
    found = find_patient_leaks(
        ["a", "b", "a", None, None, "b", "c"], ["x", "x", "y", "x", "y", None, "y"], list("0123456")
    )
    assert [(leak.patient, leak.ids) for leak in found] == [("a", {"x": ["0"], "y": ["2"]})]


@pytest.fixture(scope="module")
def leaking() -> RadiographTable:
    images = [*(radiograph(seed) for seed in range(6)), crop(radiograph(1)), {"bytes": b"no picture", "path": None}]
    return table(
        images,
        id=[f"image-{number}" for number in range(8)],
        split=["train"] * 4 + ["test"] * 3 + [None],
        patient=["a", "b", "c", None, "a", None, None, "c"],
    )


def test_a_leaking_split(leaking):
    report = check_leaks(leaking, "split")
    assert report.found
    assert report.rows == {"train": 4, "test": 3}
    assert report.unknown_patients == 3
    assert [(leak.patient, leak.ids) for leak in report.patients] == [
        ("a", {"train": ["image-0"], "test": ["image-4"]})
    ]
    (leak,) = report.images
    assert (leak.first_side, leak.first, leak.second_side, leak.second) == ("train", "image-1", "test", "image-6")
    assert report.broken == {}  # the broken image is on no side
    assert "1 patient(s)" in str(report) and "'a' in train (image-0) and test (image-4)" in str(report)
    assert "1 nearly equal image pair(s): train 'image-1' and test 'image-6'" in str(report)
    assert report.to_dict()["images"][0]["second"] == "image-6"


def test_a_broken_image_is_listed(leaking):
    rows = leaking.rows.set_column(2, "split", pa.array(["train"] * 4 + ["test"] * 4))
    report = check_leaks(RadiographTable(rows, "made-up"), "split")
    assert list(report.broken) == ["image-7"]
    assert "not a PNG, JPEG" in report.broken["image-7"] or "image-7" in report.broken
    thumbnails, broken = read_thumbnails([leaking], workers=1)
    assert thumbnails.shape == (8, 64, 64) and list(broken) == [7] and not thumbnails[7].any()


def test_between_sets():
    first = table([radiograph(seed) for seed in range(4)], "first", patient=["a", "b", None, None])
    second = table([brighten(radiograph(2)), radiograph(9)], "second", patient=["z", "b"])
    report = check_leaks({"mine": first, "theirs": second})
    assert report.rows == {"mine": 4, "theirs": 2}
    assert [(leak.first, leak.second) for leak in report.images] == [("mine: row 2", "theirs: row 0")]
    assert [leak.ids for leak in report.patients] == [{"mine": ["mine: row 1"], "theirs": ["theirs: row 1"]}]


def test_splits_of_several_sets_are_compared_by_name():
    """The same image in the training rows of two sets is no leak; in the one's and the other's test rows it is."""
    first = table([radiograph(0), radiograph(1)], "first", split=["train", "train"])
    second = table([radiograph(0), reencode(radiograph(1))], "second", split=["train", "test"])
    report = check_leaks({"first": first, "second": second}, "split")
    assert [(leak.first, leak.second) for leak in report.images] == [("first: row 1", "second: row 1")]


def test_no_leak(leaking):
    report = check_leaks(RadiographTable(leaking.rows.slice(1, 5), "made-up"), "split", sides=["train", "test"])
    assert not report.found and str(report) == "no leak found"


def test_training_is_refused(leaking):
    with pytest.raises(
        SpcxrError, match=r"^made-up: split leaks: 1 patient\(s\) on several sides: patient 'a' in"
    ) as told:
        refuse_leaks(leaking, "split", images=False)
    assert "\n" not in str(told.value) and "image pair" not in str(told.value)
    with pytest.raises(SpcxrError, match="nearly equal image pair"):
        refuse_leaks(leaking, "split")
    with pytest.warns(UserWarning, match="split leaks: 1 patient"):
        assert refuse_leaks(leaking, "split", allow="all").found
    for allowed, left in (("patients", "images"), ("images", "patients")):
        with pytest.raises(LeakError) as told:
            refuse_leaks(leaking, "split", allow=allowed)
        assert getattr(told.value.report, left)
    with pytest.raises(SpcxrError, match="allow must be no, patients, images, all; got 'yes'"):
        refuse_leaks(leaking, "split", allow="yes")


def test_training_goes_on_without_a_leak(leaking):
    report = refuse_leaks(
        RadiographTable(leaking.rows.slice(1, 5), "made-up"), "split", ("train", "test"), images=False
    )
    assert not report.found and report.images is None


def test_only_the_first_examples_are_told():
    images = [{"bytes": None, "path": None}] * 10
    rows = table(images, split=["train", "test"] * 5, patient=[f"p{number // 2}" for number in range(10)])
    with pytest.raises(SpcxrError, match=r"5 patient\(s\).*'p0'.*'p2'.*, \.\.\.$") as told:
        refuse_leaks(rows, "split", images=False)
    assert "p3" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_column": "colour"}, "made-up: no column 'colour'"),
        ({"split_column": "split", "sides": ["train", "tset"]}, "no row is in 'tset'; there are train, test"),
        ({"split_column": "split", "sides": ["train"]}, "a leak needs two sides; there is train"),
        ({}, "a leak needs two sides; there is made-up"),
        ({"split_column": "split", "workers": 0}, "workers must be at least 1; got 0"),
    ],
)
def test_refusals(leaking, settings, message):
    with pytest.raises(SpcxrError, match=message):
        check_leaks(leaking, **settings)


# The measurement


def test_the_measurement_finds_what_was_hidden(tmp_path, monkeypatch):
    """One true copy between pretraining and a test split, and six copies of each kind."""
    count = 24
    images = [radiograph(seed) for seed in range(count - 1)] + [brighten(radiograph(2))]
    columns = {
        "id": [f"image-{row}" for row in range(count)],
        "patient": [f"p{row // 2}" for row in range(count)],
        "source": ["here"] * count,
        "pretrain": [row < 16 for row in range(count)],
        "lung_split": [None if row < 16 else "test" for row in range(count)],
    }
    pq.write_table(table(images, **columns).rows, tmp_path / "set.parquet")
    names = {name: str(tmp_path / name) for name in ("leaks.json", "pairs.json", "sheet.png")}
    command = ["--data", str(tmp_path / "set.parquet"), "--copies", "3", "--output", names["leaks.json"]]
    command += ["--pairs", names["pairs.json"], "--sheet", names["sheet.png"]]
    monkeypatch.setattr("sys.argv", ["check_leaks.py", *command])
    check_leaks_script.main()
    result = json.loads((tmp_path / "leaks.json").read_text())
    assert result["radiographs"] == count and result["unreadable"] == 0
    assert str(tmp_path) not in json.dumps(result)
    for half in ("first_half", "second_half"):
        recall = result[half][f"{duplicates.SAME_IMAGE:g}"]["recall"]
        assert all(recall[kind] == 1 for kind in check_leaks_script.HELD_TO)
        assert result[half][f"{duplicates.SAME_IMAGE:g}"]["pairs_compared"] == 12 * 11 // 2
    assert result["all_images"]["pairs_found"] == 1
    assert result["all_images"]["patients_of_pairs"] == {"different": 1}
    assert result["leaks"]["pretrain"]["rows"] == {"pretrain": 16, "held out": 8}
    assert result["leaks"]["pretrain"]["image_pairs"] == 1
    assert result["leaks"]["pretrain"]["images"] == {"held out": 1, "pretrain": 1}
    assert result["leaks"]["lung_split"]["image_pairs"] == 0  # a row without a value is on no side
    assert result["leaks"]["images_both_for_pretraining_and_held_out"] == 0
    ((first, second, _),) = json.loads((tmp_path / "pairs.json").read_text())
    assert {first, second} == {"image-2", "image-23"}
    assert Image.open(names["sheet.png"]).size == (12 * 128, 64)


@pytest.mark.parametrize("known", [False, True])
def test_verifying_that_nothing_leaks(tmp_path, capsys, known):
    images = [radiograph(0), radiograph(1), brighten(radiograph(0)), radiograph(2), reencode(radiograph(1))]
    rows = table(
        images,
        id=list("abcde"),
        patient=["1", "2", "3", "4", "2"],
        pretrain=[True, True, False, False, False],
        lung_split=[None, "train", "test", "val", "train"],
    )
    pq.write_table(rows.rows, tmp_path / "set.parquet")
    words = ["--data", str(tmp_path / "set.parquet"), "--verify"]
    with pytest.raises(SpcxrError, match="or held out leaks: 1 nearly equal image pair.*pretrain 'a' and held"):
        check_leaks_script.main([*words, "pretrain"])
    (tmp_path / "copies.txt").write_text("a\n")
    check_leaks_script.main([*words, "pretrain", "--exclude", str(tmp_path / "copies.txt")])
    assert json.loads(capsys.readouterr().out) == {
        "rows": {"pretrain": 1, "held out": 2},  # e, in train alone, is on neither side
        "patients": 0,
        "image_pairs": 0,
        "unknown_patients": 0,
        "unreadable": 0,
    }
    check_leaks_script.main([*words, "lung_split"])
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 2, "test": 1, "val": 1}


def test_the_threshold_is_the_largest_that_finds_nearly_all():
    similarities = {kind: np.array([0.9] * 98 + [0.1] * 2) for kind in check_leaks_script.HELD_TO}
    assert check_leaks_script.choose_threshold(similarities) == 0.89
    similarities["crop"] = np.array([0.9] * 97 + [0.7, 0.65, 0.1])
    assert check_leaks_script.choose_threshold(similarities) == 0.69


def test_the_less_important_copy_goes():
    sides = {"a": "train", "b": "val", "c": "test", "d": "shift", "e": None, "f": "train", "g": "fold 1", "h": "fold 2"}
    for pair, gone in (("ad", "a"), ("ba", "a"), ("bc", "b"), ("dc", "c"), ("gd", "d"), ("hg", "g")):
        assert copies_to_leave_out([tuple(pair)], sides) == {gone}
    assert copies_to_leave_out([("a", "e"), ("a", "f"), ("x", "a")], sides) == set()
    assert copies_to_leave_out([("a", "b"), ("b", "c"), ("a", "c")], sides) == {"a", "b"}


def test_copies_of_a_split_are_listed(tmp_path):
    images = [radiograph(0), radiograph(1), reencode(radiograph(0)), brighten(radiograph(1)), radiograph(2)]
    rows = table(images, id=list("abcde"), split=["train", "val", "test", "shift", "train"])
    with pytest.raises(SpcxrError, match="a list of copies needs a column of splits"):
        audit(rows, tmp_path, copies_list=tmp_path / "copies.txt")
    audit(rows, tmp_path, split_column="split", copies_list=tmp_path / "copies.txt")
    assert read_ids(tmp_path / "copies.txt") == {"a", "b"}
    assert not check_leaks(RadiographTable(rows.without({"a", "b"}).rows, "left"), "split").found


def test_known_pairs(tmp_path):
    """Rounded to three digits: what may be above the threshold counts."""
    (tmp_path / "pairs.json").write_text(
        json.dumps([["a", "c", 0.9], ["d", "b", duplicates.SAME_IMAGE], ["e", "c", 0.769]])
    )
    assert check_leaks_script.read_pairs(tmp_path / "pairs.json") == [("a", "c"), ("d", "b")]


@pytest.mark.parametrize("text", ["", "[1]", "[[1, 2]]", "{}x"])
def test_pairs_that_cannot_be_read(tmp_path, text):
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(SpcxrError, match="pairs.json: not a list of"):
        check_leaks_script.read_pairs(tmp_path / "pairs.json")
