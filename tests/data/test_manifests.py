import io
import json
import logging
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import CLASSES, encoded, picture, write_set
from PIL import Image

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import label_matrix
from spcxr_hf.data.manifests import (
    SCHEMA,
    age_of,
    read_folder,
    read_manifest,
    read_rows,
    read_shards,
    sex_of,
    split_of,
    view_of,
)
from spcxr_hf.data.sets import read_dataset, read_set, unite
from spcxr_hf.data.table import decode_images, decode_masks

NAN = float("nan")


def write_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, 24)[0]).save(path)
    return path


def write_manifest(folder: Path, text: str, name: str = "set.csv", encoding: str = "utf-8") -> Path:
    for seed, picture_name in enumerate(("a.png", "sub/b.png", "c.png")):
        write_picture(folder / picture_name, seed)
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "spellings"),
    [
        ("PA", ["PA"]),
        ("AP", ["AP", "AP_horizontal", "AP Supine"]),
        ("lateral", ["LL", "L", "LATERAL"]),
        (None, ["AP LLD", "COSTAL", "", None]),
    ],
)
def test_views(view, spellings):
    assert {view_of(text) for text in spellings} == {view}


@pytest.mark.parametrize(
    ("years", "spellings"),
    [
        (58, ["058Y", "58", "58yrs", "58.0"]),
        (0.5, ["006M", "6 months"]),
        (31.5, ["31.5"]),
        (None, ["411", "?", "", None, "-1", "nan", "45 cm"]),
    ],
)
def test_ages(years, spellings):
    assert {age_of(text) for text in spellings} == {years}


def test_sexes_and_splits():
    assert [sex_of(text) for text in ("Female", "m", "Unknown", "", None, "O")] == ["F", "M", None, None, None, None]
    spelled = ["validate", "VAL", "training", "shift", " ", None]
    assert [split_of(text) for text in spelled] == ["val", "val", "train", "shift", None, None]


# ---- manifests ---------------------------------------------------------------------------------------------------


def test_a_manifest_becomes_the_schema(tmp_path):
    text = (
        "path,patient,view,sex,age,split,Effusion,Mass,ward\n"
        "a.png,007,PA,female,63,train,1,,3\nsub/b.png,007,LL,M,,valid,0,-1,\nc.png,,,,x,,,0,4\n"
    )
    table = read_manifest(write_manifest(tmp_path, text), labels=["Effusion", "Mass"], uncertain="one")
    assert {name: table.rows.schema.field(name).type for name in SCHEMA} == SCHEMA
    assert table.column("image")[1] == {"bytes": None, "path": str(tmp_path / "sub/b.png")}
    assert table.ids == ["a.png", "sub/b.png", "c.png"]
    assert table.column("patient") == ["007", "007", None]  # text: no zero is lost
    assert table.column("view") == ["PA", "lateral", None]
    assert table.column("sex") == ["F", "M", None]
    assert table.column("age") == [63, None, None]
    assert table.column("split") == ["train", "val", None]
    assert table.column("ward") == ["3", None, "4"]
    np.testing.assert_array_equal(label_matrix(table, ["Effusion", "Mass"]), [[1, NAN], [0, 1], [NAN, 0]])
    assert decode_images(table, 16).shape == (3, 1, 16, 16)  # relative paths begin at the manifest


@pytest.mark.parametrize(("name", "comma"), [("set.tsv", "\t"), ("set.csv", ",")])
def test_columns_can_be_mapped_and_lists_of_labels_read(tmp_path, name, comma):
    text = f"file{comma}person{comma}labels\na.png{comma}p{comma}Mass|Effusion\nsub/b.png{comma}p{comma}\n"
    path = write_manifest(tmp_path, text + f"c.png{comma}q{comma}No finding\n", name)
    table = read_manifest(path, {"path": "file", "patient": "person"})
    assert table.column("patient") == ["p", "p", "q"]
    matrix = label_matrix(table, ["No Finding", "Mass", "Pleural Effusion"])
    np.testing.assert_array_equal(matrix, [[0, 1, 1], [NAN, NAN, NAN], [1, 0, 0]])


def test_a_parquet_manifest_with_lists_and_masks(tmp_path):
    path = write_manifest(tmp_path, "", "empty.txt").with_name("set.parquet")
    columns = {"path": ["a.png", "c.png"], "labels": [["Mass"], []], "mask": ["sub/b.png", None], "patient": [7, 8]}
    pq.write_table(pa.table(columns), path)
    table = read_manifest(path)
    np.testing.assert_array_equal(label_matrix(table, ["Mass"]), [[1], [NAN]])  # an empty list was not labelled
    assert table.column("patient") == ["7", "8"]
    assert table.column("masks") == [[{"name": "mask", "path": str(tmp_path / "sub/b.png"), "rle": None}], None]


@pytest.mark.parametrize(
    ("column", "cells", "options", "said"),
    [
        ("patient", [["p"]], {}, "patient must be a column of text or numbers; it holds list"),
        ("labels", [3], {}, "labels must hold lists"),
        ("Mass", [[1]], {"labels": ["Mass"]}, "Mass must be a column of numbers; it holds list"),
    ],
)
def test_parquet_columns_of_other_types_are_named(tmp_path, column, cells, options, said):
    write_manifest(tmp_path, "")
    pq.write_table(pa.table({"path": ["a.png"], column: cells}), tmp_path / "set.parquet")
    with pytest.raises(SpcxrError, match=rf"set.parquet: .*{said}"):
        read_manifest(tmp_path / "set.parquet", **options)


def test_a_parquet_manifest_takes_booleans_structs_and_large_text(tmp_path):
    write_manifest(tmp_path, "")
    path = pa.array(["a.png", "c.png"], pa.large_string())
    struct = pa.array([{"Mass": 1, "Edema": -1}, {"Mass": None, "Edema": 0}])
    pq.write_table(pa.table({"path": path, "Hernia": [True, None], "labels": struct}), tmp_path / "set.parquet")
    same = read_manifest(tmp_path / "set.parquet", uncertain="one")
    np.testing.assert_array_equal(label_matrix(same, ["Mass", "Edema"]), [[1, 1], [NAN, 0]])
    other = read_manifest(tmp_path / "set.parquet", labels=["Hernia"])
    np.testing.assert_array_equal(label_matrix(other), [[1], [NAN]])
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        cells = pa.array([" 1", ""]).cast(kind)
        pq.write_table(pa.table({"path": path, "Mass": cells}), tmp_path / "set.parquet")
        assert label_matrix(read_manifest(tmp_path / "set.parquet", labels=["Mass"])).flatten().tolist()[0] == 1


def test_another_folder_and_absolute_paths(tmp_path):
    manifest = write_manifest(tmp_path / "lists", "path\nx.png\n")
    write_picture(tmp_path / "images" / "x.png")
    assert len(read_manifest(manifest, folder=tmp_path / "images")) == 1
    manifest.write_text(f"path\n{tmp_path / 'images' / 'x.png'}\n")
    assert len(read_manifest(manifest, image_root=tmp_path)) == 1
    with pytest.raises(SpcxrError, match=r"set\.csv: row 0: .*x\.png is outside .*lists; image_root"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("image\na.png\n", {}, "no column 'path'; there are image"),
        ("path\na.png\n", {"columns": {"patient": "who"}}, "no column 'who' for patient"),
        ("path\na.png\n", {"columns": {"bed": "path"}}, "cannot map bed"),
        ("path\na.png\n", {"labels": ["Mass"]}, "no column 'Mass' of labels"),
        ("path\na.png\nnone.png\n", {}, r"row 3: .*none.png: no such file \(1 of 2 are missing\)"),
        ("path,mask\na.png,c.png\nc.png,m.png\n", {}, "row 3: .*m.png: no such file"),
        ("path\na.png\nc.png\na.png\n", {}, "rows 2 and 4 are the same image, a.png"),
        ("path,Mass\na.png,1\nc.png,yes\n", {"labels": ["Mass"]}, "row 3: Mass is 'yes', no number"),
        ("path,Mass\na.png,1\nc.png,7\n", {"labels": ["Mass"]}, "row 1 holds 7"),
        ("path,who\na.png,1\n,2\n", {}, "row 3: no path"),
        ("path,who\na.png,1\nc.png,2,3\n", {}, "row 3 has 3 cells, the header 2"),
        ("path,path\na.png,c.png\n", {}, "two columns are called 'path'"),
        ("path\n", {}, "there are no rows"),
        ("", {}, "Empty CSV"),
        ("path\na.png\n", {"missing": "guess"}, "missing must be error or skip"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(tmp_path, text, options, said):
    path = write_manifest(tmp_path, text)
    with pytest.raises(SpcxrError, match=said) as caught:
        read_manifest(path, **options)
    assert "\n" not in str(caught.value)
    assert "set.csv" in str(caught.value) or "must be" in str(caught.value) or "no rows" in str(caught.value)


def test_another_encoding_is_named_with_its_row(tmp_path):
    path = write_manifest(tmp_path, "path,who\na.png,x\nc.png,Müller\n", encoding="latin-1")
    with pytest.raises(SpcxrError, match=r"set.csv: not readable .*Row #3.*invalid UTF8"):
        read_manifest(path)
    path = write_manifest(tmp_path, "path,grün\na.png,x\n", encoding="latin-1")
    with pytest.raises(SpcxrError, match="set.csv: not readable"):
        read_manifest(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = write_manifest(tmp_path, "")
    path.write_bytes("\ufeffpath,patient\r\na.png,1\r\n".encode())
    assert read_manifest(path).column("patient") == ["1"]


def test_rows_without_files_can_be_left_out_and_are_logged(tmp_path, caplog):
    path = write_manifest(tmp_path, "path,mask\nx.png,\na.png,c.png\nc.png,y.png\n")
    with caplog.at_level(logging.WARNING):
        table = read_manifest(path, missing="skip")
    assert table.ids == ["a.png"]
    assert "x.png" in caplog.text
    assert "y.png" in caplog.text


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_no_such_manifest(tmp_path, name):
    with pytest.raises(SpcxrError, match=f"{name}: no such file"):
        read_rows(tmp_path / name)


def test_a_damaged_parquet_manifest(tmp_path):
    (tmp_path / "set.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SpcxrError, match="not a readable Parquet"):
        read_manifest(tmp_path / "set.parquet")


@pytest.mark.slow
def test_twenty_thousand_rows_take_less_than_two_seconds(tmp_path):
    names = [f"{number}.png" for number in range(20_000)]
    for name in names:
        (tmp_path / name).touch()  # nothing is decoded: they need no content
    text = "".join(f"{name},p{number // 3},{number % 2},,{-(number % 2)}\n" for number, name in enumerate(names))
    (tmp_path / "set.csv").write_text("path,patient,Mass,Nodule,Edema\n" + text)
    took = []
    for _ in range(3):  # what else this process still has to do is not what is measured
        start = time.process_time()  # a busy machine's wall clock says nothing of this code
        table = read_manifest(tmp_path / "set.csv", labels=["Mass", "Nodule", "Edema"])
        took.append(time.process_time() - start)
    assert min(took) < 2
    assert label_matrix(table, ["Mass"]).sum() == 10_000


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_with_splits_and_classes(tmp_path):
    for name in ("train/normal/1.png", "train/tb/2.png", "valid/tb/x/3.jpg", "train/tb/._2.png", "train/tb/notes.txt"):
        write_picture(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).touch()
    table = read_folder(tmp_path)
    assert table.ids == ["train/normal/1.png", "train/tb/2.png", "valid/tb/x/3.jpg"]
    assert table.column("split") == ["train", "train", "val"]
    assert table.column("label") == ["normal", "tb", "tb"]
    assert read_folder(tmp_path, classes=False).column("label") == [None] * 3


def test_a_flat_folder_has_no_classes(tmp_path):
    write_picture(tmp_path / "1.png")
    write_picture(tmp_path / "more" / "2.png")
    assert read_folder(tmp_path).column("label") == [None, None]
    with pytest.raises(SpcxrError, match=r"1.png is not in a class folder"):
        read_folder(tmp_path, classes=True)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(SpcxrError, match="no pictures"):
        read_folder(tmp_path)
    with pytest.raises(SpcxrError, match="no such folder"):
        read_folder(tmp_path / "none")


# ---- shards --------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def png(seed: int) -> bytes:
    return encoded(picture(seed, 24)[0])["bytes"]


def test_shards_become_a_table(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": b'{"patient": "p", "dose": 2}', "b.png": png(1)})
    write_tar(tmp_path / "1.tar", {"c.png": png(2), "c.json": json.dumps({"split": "val"}).encode(), "c.cls": b"1"})
    table = read_shards(tmp_path)
    assert table.ids == ["a", "b", "c"]
    assert table.column("patient") == ["p", None, None]
    assert table.column("split") == [None, None, "val"]
    assert table.column("dose") == [2, None, None]
    assert table.column("cls") == [None, None, 1]
    assert table.column("image")[2]["bytes"] == png(2)
    assert decode_images(table, 16).shape == (3, 1, 16, 16)
    assert "dose" not in read_shards(tmp_path, columns=["cls"]).rows.column_names


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.png": b"", "a.json": b"[1"}, "a.json cannot be read"),
        ({"a.png": b"", "a.json": b'{"x": 1}', "b.png": b"", "b.json": b'{"x": "y"}'}, "entry 'x' has values"),
        ({"a.png": b"", "a.cls": b"cat"}, "cls is not the number"),
        ({"a.txt": b""}, "no pictures"),
    ],
)
def test_wrong_shards_are_named(tmp_path, members, said):
    with pytest.raises(SpcxrError, match=said):
        read_shards(write_tar(tmp_path / "0.tar", members))


def test_shards_too_large_for_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("spcxr_hf.data.manifests.LARGEST_TABLE", 100)
    with pytest.raises(SpcxrError, match="stream the set"):
        read_shards(write_tar(tmp_path / "0.tar", {"a.png": png(0)}))


# ---- datasets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)), "age": datasets.Value("int64")}
    )
    rows = {"image": [encoded(picture(seed, 24)[0]) for seed in range(3)], "label": [0, 2, 1], "age": [1, None, 3]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_dataset_is_taken_without_decoding(dataset):
    table = read_dataset(dataset)
    assert table.column("label") == ["normal", "viral", "bacterial"]
    assert table.column("age") == [1, None, 3]
    assert table.column("image")[0]["bytes"] == encoded(picture(0, 24)[0])["bytes"]
    assert read_dataset(dataset.select([2, 0])).column("label") == ["bacterial", "normal"]  # in the order asked for


def test_a_saved_dict_keeps_its_splits(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=dataset, validation=dataset.select([0])).save_to_disk(tmp_path / "set")
    table = read_dataset(tmp_path / "set")
    assert table.column("split") == ["train"] * 3 + ["val"]
    assert len(read_dataset(tmp_path / "set", split="validation")) == 1
    assert decode_images(table, 16).shape == (4, 1, 16, 16)
    with pytest.raises(SpcxrError, match="no split 'test'"):
        read_dataset(tmp_path / "set", split="test")


def test_a_saved_set_names_files_of_its_own_folder_only(dataset, tmp_path):
    folder = tmp_path / "saved"
    dataset.remove_columns(["label", "age"]).select([0]).save_to_disk(folder)
    (shard,) = folder.glob("*.arrow")
    schema = pa.ipc.open_stream(shard.read_bytes()).schema
    inside, outside = write_picture(folder / "images" / "a.png"), write_picture(tmp_path / "private.png")

    def name(path: Path) -> None:  # `save_to_disk` puts bytes into a set; one of a stranger may have names
        cell = pa.array([{"bytes": None, "path": str(path)}], schema.field("image").type)
        with pa.ipc.new_stream(shard, schema) as stream:
            stream.write_table(pa.table({"image": cell}, schema=schema))

    for path in (outside, folder / ".." / "private.png"):
        name(path)
        with pytest.raises(SpcxrError, match=r"row 0: .*private\.png is outside .*saved; image_root"):
            read_set(folder)
        assert decode_images(read_set(folder, image_root=tmp_path), 16).shape == (1, 1, 16, 16)
    name(inside)
    assert decode_images(read_set(folder), 16).shape == (1, 1, 16, 16)


def test_datasets_that_cannot_be_read(dataset, tmp_path):
    with pytest.raises(SpcxrError, match="not a set that save_to_disk wrote"):
        read_dataset(tmp_path)
    with pytest.raises(SpcxrError, match="no feature 'picture' of type Image; there are image"):
        read_dataset(dataset, image_column="picture")


def test_a_hub_id_without_network_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SpcxrError, match=r"nobody/no-such-set: .*offline") as caught:
        read_dataset("nobody/no-such-set")
    assert "\n" not in str(caught.value)


# ---- unions ----------------------------------------------------------------------------------------------------------


def test_unions_keep_the_unlabelled_missing(tmp_path):
    first = read_manifest(write_manifest(tmp_path, "path,Mass,ward\na.png,1,x\n"), labels=["Mass"])
    second = read_manifest(write_manifest(tmp_path, "path,Effusion\nc.png,0\n"), labels=["Effusion"])
    third = read_folder(tmp_path / "sub")
    union = unite([first, second, third])
    assert len(union) == 3
    np.testing.assert_array_equal(label_matrix(union, ["Mass", "Effusion"]), [[1, NAN], [NAN, 0], [NAN, NAN]])
    np.testing.assert_array_equal(label_matrix(union), label_matrix([first, second, third]))
    assert union.column("ward") == ["x", None, None]
    assert union.ids == ["a.png", "c.png", "b.png"]


def test_unions_that_do_not_go_together(tmp_path):
    with pytest.raises(SpcxrError, match="no sets"):
        unite([])
    write_set(tmp_path / "set.parquet", ["train"])
    from spcxr_hf.data.table import read_table

    shard = read_table(tmp_path / "set.parquet")
    shard.rows = shard.rows.drop_columns(["id"]).append_column("id", pa.array([1]))
    with pytest.raises(SpcxrError, match="do not go together"):
        unite([shard, read_table(write_picture(tmp_path / "x" / "a.png").parent)])


def test_an_image_folder_of_datasets_keeps_its_columns(tmp_path, capsys):
    for split, label in (("train", "normal"), ("test", "viral")):
        for number in range(2):
            write_picture(tmp_path / split / f"{number}.png", number)
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n0.png,{label}\n")
    table = read_set(tmp_path)
    assert dict(zip(table.ids, table.column("label"), strict=True)) == {"train/0.png": "normal", "test/0.png": "viral"}
    assert sorted(table.column("split")) == ["test", "train"]
    assert (
        "ImageFolder of 2 pictures (metadata.csv, file_name); 2 pictures that it does not name"
        in capsys.readouterr().err
    )
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,viral\n")
    assert read_set(tmp_path).rows.select(["id", "split", "label"]).to_pylist() == [
        {"id": "train/1.png", "split": "train", "label": "viral"}
    ]
    assert len(read_set(tmp_path, read_as="pictures")) == 4


def test_an_image_folder_with_json_lines(tmp_path):
    for number in range(3):
        write_picture(tmp_path / "train" / f"{number}.png", number)
    rows = [
        {"file_name": "0.png", "label": "normal", "age": 64, "patient": "007"},
        {"file_name": "1.png", "label": "viral", "age": None, "objects": {"bbox": [[1.0, 2.0, 3.0, 4.0]]}},
    ]
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = read_set(tmp_path)
    found = table.rows.select(["id", "split", "label", "age", "patient"]).to_pylist()
    assert found[0] == {"id": "train/0.png", "split": "train", "label": "normal", "age": 64.0, "patient": "007"}
    assert found[1] == {"id": "train/1.png", "split": "train", "label": "viral", "age": None, "patient": None}
    for damage, message in (
        ('{"file_name": "0.png"', "not readable as JSON Lines in UTF-8: row 1: "),
        ('{"file_name": "0.png"}\n[1]', "row 2: no JSON object with a value per column"),
        ('{"file_name": "0.png", "age": 3}\n{"file_name": "1.png", "age": [3]}', "not readable as JSON Lines"),
        ('{"file_name": "0.png"}\n{"file_name": "9.png"}', r"row 2: .*9\.png: no such file"),
    ):
        file.write_text(damage)
        with pytest.raises(SpcxrError, match=rf"metadata\.jsonl: {message}"):
            read_set(tmp_path)


@pytest.mark.parametrize("layout", ["{kind}/{name}", "{split}/{kind}/{name}", "{kind}/{split}/{name}"])
def test_images_beside_masks_of_the_same_name(tmp_path, layout, capsys):
    for seed, split in enumerate(("train", "train", "val")):
        for kind, pixels in zip(("images", "masks"), picture(seed, 24), strict=True):
            name = f"{seed}.{'jpg' if kind == 'images' else 'png'}"
            file = tmp_path / layout.format(kind=kind, split=split, name=name)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    table = read_set(tmp_path)
    assert "read as 3 pictures of images/, 3 of them with a mask of masks/" in capsys.readouterr().err
    assert table.column("split") == (["train", "train", "val"] if "split" in layout else [None] * 3)
    masks = decode_masks(table, 24).numpy()
    assert np.array_equal(masks, np.stack([picture(seed, 24)[1] > 0 for seed in range(3)]))
    file.rename(file.with_name("other.png"))
    with pytest.raises(SpcxrError, match="the mask .*other has no picture of its name"):
        read_set(tmp_path)
