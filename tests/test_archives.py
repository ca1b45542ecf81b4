"""Every archive on a small tree in its published layout; images are empty files where nothing should open them."""

import gzip
import logging
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import encoded, picture, write_set
from PIL import Image

from spcxr_hf import SpcxrError
from spcxr_hf.archives import ARCHIVES, read_archive, read_set
from spcxr_hf.data import RadiographTable, decode_images, decode_masks
from spcxr_hf.labels import CHEXPERT14, COMMON, NIH14, VINDR28, label_matrix, label_names
from spcxr_hf.manifests import SCHEMA, unite
from spcxr_hf.masks import convert_jsrt, read_jsrt_image, read_mask, rle_mask, with_masks
from spcxr_hf.radiograph import read_radiograph

NAN = float("nan")


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_mask(path: Path, rows: slice, columns: slice, size: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size, size), np.uint8)
    mask[rows, columns] = 255
    Image.fromarray(mask).save(path)
    return path


def labels(table: RadiographTable, *names: str) -> list[list[float]]:
    return label_matrix(table, names).tolist()


def same(values: list[list[float]], expected: list[list[float]]) -> None:
    np.testing.assert_array_equal(np.array(values), np.array(expected))


# ---- the trees -----------------------------------------------------------------------------------------------------


def make_nih(root: Path) -> Path:
    write(
        root / "Data_Entry_2017_v2020.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
        "00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143\n"
        "00000001_001.png,No Finding,1,1,058Y,M,AP,2894,2729,0.143,0.143\n"
        "00000002_000.png,Pleural_Thickening,0,2,411,F,PA,2500,2048,0.168,0.168\n",
    )
    write(root / "images_001" / "images" / "00000001_000.png")
    write(root / "images_001" / "images" / "00000001_001.png")
    write(root / "images_012" / "images" / "00000002_000.png")
    write(root / "train_val_list.txt", "00000001_000.png\n00000001_001.png\n")
    write(root / "test_list.txt", "00000002_000.png")
    write(
        root / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,225.1,547.0,86.8,79.2,,,\n",
    )
    return root


CHEXPERT_HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(CHEXPERT14)


def chexpert_cells(**values: str) -> str:
    return ",".join(values.get(name.replace(" ", "_"), "") for name in CHEXPERT14)


def make_chexpert(root: Path) -> Path:
    front = "train/patient00001/study1/view1_frontal.jpg"
    side = "train/patient00001/study1/view2_lateral.jpg"
    valid = "valid/patient64541/study1/view1_frontal.jpg"
    cells = chexpert_cells(No_Finding="1.0"), chexpert_cells(Edema="-1.0", Fracture="0.0", Pleural_Effusion="1.0")
    write(
        root / "train.csv",
        f"{CHEXPERT_HEADER}\nCheXpert-v1.0-small/{front},Female,68,Frontal,AP,{cells[0]}\n"
        f"CheXpert-v1.0-small/{side},Female,68,Lateral,,{cells[1]}\n",
    )
    write(root / "valid.csv", f"{CHEXPERT_HEADER}\nCheXpert-v1.0/{valid},Unknown,0,Frontal,PA,{cells[0]}\n")
    for name in (front, side, valid):
        write(root / name)
    return root


def make_mimic(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    tables = {
        "metadata": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns\n"
        "02aa-1,10000032,50414267,CHEST (PA AND LAT),PA,3056,2544\n"
        "174f-2,10000032,50414267,CHEST (PA AND LAT),LATERAL,3056,2544\n"
        "2a2b-3,10000764,57375967,,AP,3056,2544\n",
        "split": "dicom_id,study_id,subject_id,split\n02aa-1,50414267,10000032,train\n"
        "174f-2,50414267,10000032,validate\n2a2b-3,57375967,10000764,test\n",
        "chexpert": "subject_id,study_id," + ",".join(CHEXPERT14) + "\n"
        "10000032,50414267," + chexpert_cells(Atelectasis="-1.0", Pneumonia="1.0", Edema="0.0") + "\n",
    }
    for name, text in tables.items():
        with gzip.open(root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt") as file:
            file.write(text)
    for name in ("p10000032/s50414267/02aa-1", "p10000032/s50414267/174f-2", "p10000764/s57375967/2a2b-3"):
        write(root / "files" / "p10" / f"{name}.jpg")
    write(root / "files" / "p10" / "p10000032" / "s50414267.txt", "FINDINGS: none")
    return root


def make_padchest(root: Path) -> Path:
    write(
        root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
        ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,"
        "Projection,Report,Labels\n"
        "0,a_1.png,0,20140915,s1,p1,1930.0,F,POSTEROANTERIOR,PA,signos de icc,\"['pleural effusion', 'kyphosis ']\"\n"
        "1,a_2.png,0,20140915,s1,p1,1930.0,F,LATERAL,L,,\"['laminar atelectasis', '', 'unchanged']\"\n"
        "2,b_1.png,3,20150101,s2,p2,,M,ANTEROPOSTERIOR,AP_horizontal,,['normal']\n"
        "3,b_2.png,3,,s3,p2,,,,COSTAL,,\n",
    )
    for name in ("0/a_1.png", "0/a_2.png", "3/b_1.png", "3/b_2.png"):
        write(root / name)
    return root


def make_vindr(root: Path) -> Path:
    local = ["Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture"]
    local += ["Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity"]
    local += ["Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion"]
    local += ["Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"]
    names = [*local, "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"]

    def votes(*present: str) -> str:
        return ",".join("1" if name in present else "0" for name in names)

    readers = [votes("ILD", "Cardiomegaly"), votes("ILD"), votes("ILD", "Cardiomegaly", "COPD")]
    place = root / "annotations"
    rows = "".join(f"aa,R{number},{cells}\n" for number, cells in enumerate(readers))
    rows += "".join(f"bb,R{number},{votes('No finding')}\n" for number in range(3))
    write(place / "image_labels_train.csv", f"image_id,rad_ID,{','.join(names)}\n{rows}")
    test_names = ",".join(names).replace("Other diseases", "Other disease")  # as it is published
    write(place / "image_labels_test.csv", f"image_id,{test_names}\ncc,{votes('Pleural effusion')}\n")
    write(
        place / "annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\naa,R0,ILD,10,20,110.5,220\nbb,R0,No finding,,,,\n",
    )
    for name in ("train/aa", "train/bb", "test/cc"):
        write(root / f"{name}.dicom")
    return root


def make_rsna(root: Path) -> Path:
    write(
        root / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target\na,,,,,0\nb,264.0,152.0,213.0,379.0,1\nb,562.0,152.0,256.0,453.0,1\nc,,,,,0\n",
    )
    write(
        root / "stage_2_detailed_class_info.csv",
        "patientId,class\na,No Lung Opacity / Not Normal\nb,Lung Opacity\nb,Lung Opacity\nc,Normal\n",
    )
    for name in ("train_images/a", "train_images/b", "train_images/c", "test_images/d"):
        write(root / f"stage_2_{name}.dcm")
    return root


def make_siim(root: Path) -> Path:
    write(root / "train-rle.csv", "ImageId, EncodedPixels\n1.2.a, -1\n1.2.b,2 3 1020 2\n1.2.b,4096 5\n")
    for name in ("train/s1/t1/1.2.a", "train/s2/t2/1.2.b", "train/s4/t4/1.2.z", "test/s3/t3/1.2.c"):
        write(root / f"dicom-images-{name}.dcm")
    return root


def make_covidx(root: Path) -> Path:
    write(root / "train.txt", "3 a.png positive cohen\n3 b 1.png negative rsna\n")
    write(root / "val.txt", "5 c.png negative rsna\n")
    write(root / "test.txt", "9 d.png positive bimcv")
    for name in ("train/a.png", "train/b 1.png", "val/c.png", "test/d.png"):
        write(root / name)
    return root


def write_sheet(path: Path, rows: list[list[str]]) -> None:
    shared = list(dict.fromkeys(cell for row in rows for cell in row))
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    cells = [
        "".join(
            f'<c r="{"ABCD"[at]}{number}" t="s"><v>{shared.index(cell)}</v></c>' for at, cell in enumerate(row) if cell
        )
        for number, row in enumerate(rows, 1)
    ]
    lines = "".join(f'<row r="{number}">{row}</row>' for number, row in enumerate(cells, 1))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "xl/sharedStrings.xml", f"<sst {space}>{''.join(f'<si><t>{text}</t></si>' for text in shared)}</sst>"
        )
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{lines}</sheetData></worksheet>")


def make_covid_radiography(root: Path) -> Path:
    for name, count in (("COVID", 2), ("Lung_Opacity", 1), ("Normal", 1), ("Viral Pneumonia", 1)):
        for number in range(1, count + 1):
            write(root / name / "images" / f"{name}-{number}.png")
            write_mask(root / name / "masks" / f"{name}-{number}.png", slice(4, 8), slice(4, 8))
    header = ["FILE NAME", "FORMAT", "SIZE", "URL"]
    write_sheet(root / "COVID.metadata.xlsx", [header, ["COVID-1", "PNG", "", "https://sirm.org"]])
    write_sheet(root / "Normal.metadata.xlsx", [header, ["NORMAL-1", "PNG", "256*256", "https://rsna"]])
    return root


def make_kermany(root: Path) -> Path:
    for name in (
        "train/NORMAL/IM-0115-0001.jpeg",
        "train/NORMAL/NORMAL2-IM-0383-0001.jpeg",
        "train/PNEUMONIA/person1_bacteria_1.jpeg",
        "train/PNEUMONIA/VIRUS-1008087-0001.jpeg",
        "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
        "test/PNEUMONIA/person1_virus_6.jpeg",
        "test/PNEUMONIA/other.jpeg",
    ):
        write(root / name)
    return root


def make_montgomery(root: Path) -> Path:
    for name, text in (("MCUCXR_0001_0", "Patient's Sex: F\nPatient's Age: 027Y\nnormal\n"), ("MCUCXR_0104_1", "")):
        (root / "CXR_png").mkdir(parents=True, exist_ok=True)
        (root / "CXR_png" / f"{name}.png").write_bytes(encoded(picture(1, 32)[0])["bytes"])
        if text:
            write(root / "ClinicalReadings" / f"{name}.txt", text)
    write_mask(root / "ManualMask" / "leftMask" / "MCUCXR_0001_0.png", slice(8, 24), slice(4, 12))
    write_mask(root / "ManualMask" / "rightMask" / "MCUCXR_0001_0.png", slice(8, 24), slice(20, 28))
    return root


def make_shenzhen(root: Path) -> Path:
    for name, text in (("CHNCXR_0001_0", "male 45yrs\nnormal"), ("CHNCXR_0327_1", "Female, 6 months\nSTB")):
        write(root / "CXR_png" / f"{name}.png")
        write(root / "ClinicalReadings" / f"{name}.txt", text)
    write_mask(root / "mask" / "CHNCXR_0327_1_mask.png", slice(0, 16), slice(0, 32))
    return root


def make_jsrt(root: Path, suffix: str = ".IMG") -> Path:
    write(root / "Nodule154images" / f"JPCLN001{suffix}")
    write(root / "NonNodule93images" / f"JPCNN001{suffix}")
    write(
        root / "Clinical_Information" / "CLNDAT_EN.txt",
        "JPCLN001.IMG\t5\t14\t53\tMale\t1634\t692\tmalignant\tl.upper lobe\tlung cancer\n",
    )
    write(root / "Clinical_Information" / "CNNDAT_EN.TXT", "JPCNN001.IMG    ?   Female   non-nodule\n")
    for kind, columns in (("left lung", slice(2, 10)), ("right lung", slice(20, 30)), ("heart", slice(12, 18))):
        write_mask(root / "scratch" / "fold1" / "masks" / kind / "JPCLN001.gif", slice(4, 28), columns)
    return root


def make_cohen(root: Path) -> Path:
    write(
        root / "metadata.csv",
        "patientid,offset,sex,age,finding,view,modality,date,location,folder,filename,license,clinical_notes,other_notes\n"
        '2,0,M,65,Pneumonia/Viral/COVID-19,PA,X-ray,,"Ray, Vietnam",images,a.jpg,CC BY-NC-SA,"Two\nlines, quoted",\n'
        "4,,F,,Pneumonia/Bacterial/Legionella,AP Supine,X-ray,,,images,b.jpg,,,\n"
        "5,,,,No Finding,L,X-ray,,,images,c.jpg,,,\n6,,,,Pneumonia,PA,X-ray,,,images,d.jpg,,,\n"
        "7,,,,todo,PA,X-ray,,,images,e.jpg,,,\n8,,,,Pneumonia/Viral/COVID-19,Axial,CT,,,volumes,f.nii.gz,,,\n",
    )
    for name in "abcde":
        write(root / "images" / f"{name}.jpg")
    return root


MAKERS = {name.removeprefix("make_"): make for name, make in list(globals().items()) if name.startswith("make_")}


# ---- all of them ---------------------------------------------------------------------------------------------------


def test_every_archive_has_a_tree_here():
    assert MAKERS.keys() == ARCHIVES.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_is_recognised_and_in_the_schema(name, tmp_path):
    make = MAKERS[name]
    root = make(tmp_path / "data" / "set")
    table = read_archive(root)
    assert table.name == name
    assert {column: table.rows.schema.field(column).type for column in SCHEMA} == SCHEMA
    assert read_archive(root.parent, name).rows.equals(table.rows)  # the folder above will do
    assert read_set(root).rows.equals(table.rows)
    assert all(Path(cell["path"]).is_file() and cell["bytes"] is None for cell in table.column("image"))
    assert len(set(table.ids)) == len(table)
    assert all(own.startswith(f"{name}/") for own in (*table.ids, *filter(None, table.column("patient"))))
    assert set(table.column("view")) <= {"PA", "AP", "lateral", None}
    assert set(table.column("split")) <= {"train", "val", "test", None}
    assert set(label_names(table)) <= set(COMMON)
    assert all(table.column("licence")) and all(source.startswith(name) for source in table.column("source"))


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_image_is_named_or_left_out(name, tmp_path, caplog):
    root = MAKERS[name](tmp_path)
    whole = read_archive(root, name)
    gone = Path(whole.column("image")[0]["path"])
    gone.unlink()
    if name in ("covid_radiography", "kermany", "montgomery", "shenzhen", "jsrt"):  # the folder itself is the table
        assert len(read_archive(root, name)) == len(whole) - 1
        return
    with pytest.raises(SpcxrError, match=rf"{gone.stem}.*no such file \(1 of {len(whole)} are missing\)"):
        read_archive(root, name)
    with caplog.at_level(logging.WARNING):
        rest = read_archive(root, name, missing="skip")
    assert rest.ids == whole.ids[1:]
    assert gone.stem in caplog.text


def test_what_is_not_recognised_says_what_was_expected(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(SpcxrError, match=r"none of the known archives; expected nih: Data_Entry_2017\*.csv; chexpert"):
        read_archive(tmp_path)
    with pytest.raises(SpcxrError, match="not rsna; expected rsna: stage_2_train_labels.csv, stage_2_train_images$"):
        read_archive(tmp_path, "rsna")
    with pytest.raises(SpcxrError, match="no archive is called 'NIH'"):
        read_archive(tmp_path, "NIH")
    with pytest.raises(SpcxrError, match="no such folder"):
        read_archive(tmp_path / "none")


def test_an_archive_without_images_is_named(tmp_path):
    for name in ("train/NORMAL", "train/PNEUMONIA"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(SpcxrError, match=f"{tmp_path}: no images of Kermany"):
        read_archive(tmp_path)


def test_a_folder_of_two_archives_needs_a_name(tmp_path):
    make_nih(tmp_path / "nih")
    make_jsrt(tmp_path / "jsrt")
    with pytest.raises(SpcxrError, match="none of the known"):
        read_archive(tmp_path)
    assert len(read_archive(tmp_path, "nih")) == 3


# ---- each by itself ------------------------------------------------------------------------------------------------


def test_nih(tmp_path):
    table = read_archive(make_nih(tmp_path))
    assert label_names(table) == [*NIH14, "No Finding"]
    same(
        labels(table, "Cardiomegaly", "Effusion", "Pleural_Thickening", "No Finding"),
        [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]],
    )
    assert not np.isnan(label_matrix(table)).any()
    assert table.column("split") == ["train", "train", "test"]
    assert table.column("patient") == ["nih/1", "nih/1", "nih/2"]
    assert table.column("age") == [57, 58, None]
    assert table.column("view") == ["PA", "AP", "PA"]
    (box,) = table.column("boxes")[0]
    assert box["name"] == "Infiltration"
    assert [box[side] for side in ("x", "y", "width", "height")] == pytest.approx([225.1, 547.0, 86.8, 79.2], rel=1e-5)


def test_nih_without_its_lists_has_no_split_and_names_an_unknown_finding(tmp_path):
    make_nih(tmp_path)
    (tmp_path / "train_val_list.txt").unlink()
    (tmp_path / "test_list.txt").unlink()
    assert read_archive(tmp_path).column("split") == [None] * 3
    file = tmp_path / "Data_Entry_2017_v2020.csv"
    file.write_text(file.read_text().replace("Cardiomegaly", "Cardiomegally"))
    with pytest.raises(SpcxrError, match="v2020.csv: row 2: Cardiomegally is no label"):
        read_archive(tmp_path)


@pytest.mark.parametrize(("rule", "edema"), [("ignore", NAN), ("zero", 0), ("one", 1)])
def test_chexpert(tmp_path, rule, edema):
    table = read_archive(make_chexpert(tmp_path), uncertain=rule)
    expected = [[1, NAN, NAN, NAN], [NAN, edema, 0, 1], [1, NAN, NAN, NAN]]
    same(labels(table, "No Finding", "Edema", "Fracture", "Effusion"), expected)
    assert table.column("view") == ["AP", "lateral", "PA"]
    assert table.column("split") == ["train", "train", "val"]
    assert table.column("sex") == ["F", "F", None]
    assert table.column("study")[2] == "chexpert/patient64541/study1"


def test_chexpert_with_a_wrong_label_or_column(tmp_path):
    file = make_chexpert(tmp_path) / "train.csv"
    text = file.read_text()
    file.write_text(text.replace("-1.0", "-2.0"))
    with pytest.raises(SpcxrError, match=r"train.csv: Edema: .*row 1 holds -2"):
        read_archive(tmp_path)
    file.write_text(text.replace("Lung Lesion", "Lesion"))
    with pytest.raises(SpcxrError, match=r"train.csv: no column 'Lung Lesion'"):
        read_archive(tmp_path)


def test_mimic(tmp_path):
    table = read_archive(make_mimic(tmp_path / "mimic"))
    same(labels(table, "Atelectasis", "Pneumonia", "Edema"), [[NAN, 1, 0], [NAN, 1, 0], [NAN, NAN, NAN]])
    assert table.column("split") == ["train", "val", "test"]
    assert table.column("view") == ["PA", "lateral", "AP"]
    assert table.column("patient") == ["mimic/10000032", "mimic/10000032", "mimic/10000764"]
    reports = table.column("report_path")
    assert Path(reports[0]).read_text() == "FINDINGS: none"
    assert reports[2] is None


def test_mimic_without_one_of_its_tables(tmp_path):
    make_mimic(tmp_path / "mimic")
    (tmp_path / "mimic" / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(SpcxrError, match="no mimic-cxr-2.*-split.csv"):
        read_archive(tmp_path)


def test_padchest(tmp_path):
    table = read_archive(make_padchest(tmp_path))
    expected = [[1, 0, 0], [NAN, 1, NAN], [0, 0, 1], [NAN, NAN, NAN]]
    same(labels(table, "Pleural Effusion", "Atelectasis", "No Finding"), expected)
    assert table.column("terms")[:2] == [["pleural effusion", "kyphosis"], ["laminar atelectasis", "unchanged"]]
    assert table.column("view") == ["PA", "lateral", "AP", None]
    assert table.column("age") == [84, 84, None, None]
    assert table.column("report")[0] == "signos de icc"


@pytest.mark.parametrize(("rule", "copd"), [("ignore", NAN), ("one", 1)])
def test_vindr_readers_vote(tmp_path, rule, copd):
    table = read_archive(make_vindr(tmp_path), uncertain=rule)
    assert set(label_names(table)) == set(VINDR28)
    names = ("ILD", "Cardiomegaly", "COPD", "Pleural effusion", "No Finding")
    same(labels(table, *names), [[1, 1, copd, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]])
    assert table.column("split") == ["train", "train", "test"]
    box = {"name": "Interstitial Lung Disease", "x": 10, "y": 20, "width": 100.5, "height": 200}
    assert table.column("boxes") == [[box], None, None]


def test_rsna(tmp_path):
    table = read_archive(make_rsna(tmp_path))
    assert table.ids == ["rsna/a", "rsna/b", "rsna/c", "rsna/d"]
    same(labels(table, "Lung Opacity", "No Finding"), [[0, 0], [1, 0], [0, 1], [NAN, NAN]])
    assert table.column("label") == ["No Lung Opacity / Not Normal", "Lung Opacity", "Normal", None]
    assert table.column("split") == ["train", "train", "train", "test"]
    assert [len(boxes or []) for boxes in table.column("boxes")] == [0, 2, 0, 0]


def test_siim(tmp_path):
    table = read_archive(make_siim(tmp_path))
    assert table.ids == ["siim/1.2.a", "siim/1.2.b", "siim/1.2.z", "siim/1.2.c"]
    same(labels(table, "Pneumothorax"), [[0], [1], [NAN], [NAN]])
    assert table.column("split") == ["train", "train", "train", "test"]
    masks = with_masks(table, ["pneumothorax"])
    assert masks.ids == ["siim/1.2.a", "siim/1.2.b"]
    decoded = decode_masks(masks, 1024)
    assert not decoded[0].any()
    # by hand: column 0, rows 2 to 4; 5 + 1020 = column 1, rows 1 and 2; column 4, rows 0 to 4
    expected = np.zeros((1024, 1024), bool)
    expected[2:5, 0] = expected[1:3, 1] = expected[0:5, 4] = True
    np.testing.assert_array_equal(decoded[1].numpy(), expected)


@pytest.mark.parametrize(
    ("code", "said"), [("1", "pairs"), ("a 2", "pairs"), ("-1 2", "pairs"), ("15 2", "leaves the image")]
)
def test_run_length_codes_that_are_none(code, said):
    with pytest.raises(SpcxrError, match=said):
        rle_mask(code, 4)
    assert rle_mask("15 1", 4)[3, 3]


def test_covidx(tmp_path):
    table = read_archive(make_covidx(tmp_path))
    assert table.column("split") == ["train", "train", "val", "test"]
    same(labels(table, "COVID-19"), [[1], [0], [0], [1]])
    assert table.column("patient") == ["covidx/cohen/3", "covidx/rsna/3", "covidx/rsna/5", "covidx/bimcv/9"]
    assert table.column("source")[0] == "covidx/cohen"
    assert table.ids[1] == "covidx/train/b 1.png"
    write(tmp_path / "test.txt", "9 d.png positive bimcv\n\n9 d.png\n")
    with pytest.raises(SpcxrError, match="test.txt: row 3: not a patient, a file"):
        read_archive(tmp_path)


def test_covid_radiography(tmp_path):
    table = read_archive(make_covid_radiography(tmp_path))
    assert table.column("label") == ["COVID", "COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    names = ("COVID-19", "Lung Opacity", "Pneumonia", "No Finding")
    expected = [[1, NAN, NAN, 0], [1, NAN, NAN, 0], [0, 1, NAN, 0], [0, 0, 0, 1], [0, NAN, 1, 0]]
    same(labels(table, *names), expected)
    sources = ["/https://sirm.org", "", "", "/https://rsna", ""]
    assert table.column("source") == [f"covid_radiography{source}" for source in sources]
    assert decode_masks(with_masks(table), 32).sum(dim=(1, 2)).tolist() == [16] * 5
    (tmp_path / "COVID.metadata.xlsx").write_bytes(b"PK no")
    with pytest.raises(SpcxrError, match=r"COVID.metadata.xlsx: not a readable .xlsx"):
        read_archive(tmp_path)


def test_kermany(tmp_path):
    table = read_archive(make_kermany(tmp_path / "chest_xray"))
    found = dict(zip((Path(name).name for name in table.ids), table.rows.to_pylist(), strict=True))
    assert {name: row["label"] for name, row in found.items()} == {
        "IM-0115-0001.jpeg": "NORMAL",
        "NORMAL2-IM-0383-0001.jpeg": "NORMAL",
        "person1_bacteria_1.jpeg": "bacterial",
        "VIRUS-1008087-0001.jpeg": "viral",
        "person1946_bacteria_4874.jpeg": "bacterial",
        "person1_virus_6.jpeg": "viral",
        "other.jpeg": "PNEUMONIA",
    }
    patients = [found[name]["patient"] for name in found]
    assert patients == [
        "kermany/IM-0115",
        "kermany/NORMAL2-IM-0383",
        "kermany/1008087",
        "kermany/person1",
        "kermany/person1946",
        None,
        "kermany/test/person1",
    ]
    assert table.column("split") == ["train"] * 4 + ["val"] + ["test"] * 2
    by_name = {
        Path(name).name: row for name, row in zip(table.ids, labels(table, "Pneumonia", "Viral Pneumonia"), strict=True)
    }
    same(
        [by_name["IM-0115-0001.jpeg"], by_name["person1_virus_6.jpeg"], by_name["other.jpeg"]],
        [[0, 0], [1, 1], [1, NAN]],
    )


def test_montgomery_with_both_lungs(tmp_path):
    table = read_archive(make_montgomery(tmp_path / "MontgomerySet"))
    same(labels(table, "Tuberculosis"), [[0], [1]])
    assert table.column("sex") == ["F", None]
    assert table.column("age") == [27, None]
    assert table.column("label") == ["normal", "tuberculosis"]
    assert [mask["name"] for mask in table.column("masks")[0]] == ["left lung", "right lung"]
    lungs = with_masks(table)
    assert lungs.ids == ["montgomery/MCUCXR_0001_0.png"]  # the other has none
    mask = decode_masks(lungs, 32)[0]
    assert mask.sum() == 2 * 16 * 8 and mask[10, 5] and mask[10, 25] and not mask[10, 16]
    assert decode_images(lungs, 16).shape == (1, 1, 16, 16)


def test_shenzhen(tmp_path):
    table = read_archive(make_shenzhen(tmp_path / "ChinaSet_AllFiles"))
    assert table.column("sex") == ["M", "F"]
    assert table.column("age") == [45, 0.5]
    same(labels(table, "TB"), [[0], [1]])
    assert table.column("report")[1] == "Female, 6 months\nSTB"
    assert decode_masks(with_masks(table), 32).sum() == 16 * 32


def test_jsrt(tmp_path):
    table = read_archive(make_jsrt(tmp_path))
    assert table.ids == ["jsrt/JPCLN001", "jsrt/JPCNN001"]
    same(labels(table, "Nodule"), [[1], [0]])
    assert table.column("age") == [53, None]
    assert table.column("sex") == ["M", "F"]
    # by hand: 14 mm are 80 pixels of 0.175 mm, about (1634, 692)
    (box,) = table.column("boxes")[0]
    assert [box[side] for side in ("x", "y", "width", "height")] == pytest.approx([1594, 652, 80, 80])
    assert {mask["name"] for mask in table.column("masks")[0]} == {"left lung", "right lung", "heart"}
    assert decode_masks(with_masks(table), 32).sum() == 24 * (8 + 10)
    assert decode_masks(with_masks(table, ["heart"]), 32).sum() == 24 * 6


def test_jsrt_raw_images_become_png(tmp_path):
    make_jsrt(tmp_path / "raw")
    stored = np.zeros((2048, 2048), ">u2")
    stored[:, 1024:] = 4095  # dense film is black
    for file in (tmp_path / "raw").rglob("*.IMG"):
        file.write_bytes(stored.tobytes())
    image = np.asarray(read_jsrt_image(next((tmp_path / "raw").rglob("*.IMG"))))
    assert image.dtype == np.uint16
    assert (image[0, 0], image[0, -1]) == (65535, 0)
    written = convert_jsrt(tmp_path / "raw", tmp_path / "raw" / "png")
    assert [file.name for file in written] == ["JPCLN001.png", "JPCNN001.png"]
    preferred = read_archive(tmp_path / "raw").column("image")[0]["path"]
    assert preferred == str(written[0])
    with Image.open(preferred) as png:
        np.testing.assert_array_equal(np.asarray(png), image)


@pytest.mark.parametrize(
    ("data", "said"), [(b"\0" * 100, "has 8388608 bytes; this has 100"), (b"\xff" * 2 * 2048**2, "values to 4095")]
)
def test_jsrt_files_that_are_none(tmp_path, data, said):
    (tmp_path / "JPCLN001.IMG").write_bytes(data)
    with pytest.raises(SpcxrError, match=said):
        read_jsrt_image(tmp_path / "JPCLN001.IMG")
    with pytest.raises(SpcxrError, match=r"JPCLN001.IMG: a raw .IMG, as JSRT ships, .*spcxr_hf.masks.convert_jsrt"):
        read_radiograph(tmp_path / "JPCLN001.IMG")
    with pytest.raises(SpcxrError, match="none.IMG: No such file"):
        read_jsrt_image(tmp_path / "none.IMG")


def test_cohen(tmp_path):
    table = read_archive(make_cohen(tmp_path))
    assert table.ids == [f"cohen/{name}.jpg" for name in "abcde"]  # no CT
    names = ("COVID-19", "Pneumonia", "No Finding")
    same(labels(table, *names), [[1, 1, 0], [0, 1, 0], [0, 0, 1], [NAN, 1, 0], [NAN, NAN, NAN]])
    assert table.column("view") == ["PA", "AP", "lateral", "PA", "PA"]
    assert table.column("licence")[:2] == ["CC BY-NC-SA", "that of each image"]
    assert table.column("source")[0] == "cohen/Ray, Vietnam"
    assert table.column("report")[0] == "Two\nlines, quoted"


# ---- masks, unions, any set ------------------------------------------------------------------------------------------


def test_masks_that_cannot_be_read(tmp_path):
    small = write_mask(tmp_path / "a.png", slice(0, 2), slice(0, 2), 4)
    large = write_mask(tmp_path / "b.png", slice(0, 2), slice(0, 2), 8)
    broken = write(tmp_path / "c.png", "no picture")
    cell = [{"name": "lungs", "path": str(file), "rle": None} for file in (small, large, broken)]
    assert read_mask(cell[:1], ["heart"]) is None
    with pytest.raises(SpcxrError, match=r"b.png: its size differs"):
        read_mask(cell[:2])
    with pytest.raises(SpcxrError, match=r"c.png: the mask cannot be read"):
        read_mask(cell[2:])
    with pytest.raises(SpcxrError, match="no image has a mask called heart"):
        with_masks(read_archive(make_shenzhen(tmp_path / "set")), ["heart"])


def test_archives_unite_without_mixing_patients_or_labels(tmp_path):
    tables = [read_archive(make(tmp_path / name), name) for name, make in MAKERS.items()]
    union = unite(tables)
    assert len(union) == sum(len(table) for table in tables)
    np.testing.assert_array_equal(label_matrix(union), label_matrix(tables))
    nih = label_matrix(union)[: len(tables[0])]
    assert np.isnan(nih[:, label_names(union).index("Fracture")]).all()  # NIH did not label it
    patients = [{own for own in table.column("patient") if own} for table in tables]
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_read_set_takes_whatever_lies_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(picture(0, 24)[0])["bytes"])
    assert read_set(tmp_path / "pictures").ids == ["a.png"]
    assert read_set(write(tmp_path / "pictures" / "set.csv", "path\na.png\n")).ids == ["a.png"]
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "pictures" / "set.parquet")
    assert read_set(tmp_path / "pictures" / "set.parquet").ids == ["a.png"]
    write_set(tmp_path / "shards" / "0.parquet", ["train"])
    assert read_set(tmp_path / "shards").ids == read_set(tmp_path / "shards" / "0.parquet").ids == ["row-0"]
    with pytest.raises(SpcxrError, match="no such file"):
        read_set(tmp_path / "none")
    with pytest.raises(SpcxrError, match="not a readable Parquet"):
        read_set(write(tmp_path / "broken.parquet", "no"))


def test_twenty_thousand_images_of_nih_take_less_than_two_seconds(tmp_path):
    names = [f"{number:08d}_000.png" for number in range(20_000)]
    folder = tmp_path / "images_001" / "images"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    lines = "".join(f"{name},Mass|Nodule,0,{number},50,M,PA\n" for number, name in enumerate(names))
    write(tmp_path / "Data_Entry_2017.csv", header + lines)
    start = time.process_time()
    table = read_archive(tmp_path)
    assert time.process_time() - start < 2
    assert len(table) == 20_000
