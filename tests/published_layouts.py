"""Small trees of the public archives in their published layout; images that nothing should open are empty files."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
from made_up import encoded, picture
from PIL import Image

from spcxr_hf.data.labels import CHEXPERT14


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


def make_nih(root: Path) -> Path:
    write(
        root / "Data_Entry_2017_v2020.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
        "00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143\n"
        "00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143\n"
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
        "metadata": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate\n"
        "02aa-1,10000032,50414267,CHEST (PA AND LAT),PA,3056,2544,21800506\n"
        "174f-2,10000032,50414267,CHEST (PA AND LAT),LATERAL,3056,2544,21800506\n"
        "2a2b-3,10000764,57375967,,AP,3056,2544,21320913\n",
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
        "3,b_2.png,3,20150102,s3,p2,,,,COSTAL,,\n",
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

    readers = [votes("ILD", "Cardiomegaly"), votes("ILD"), votes("ILD", "Cardiomegaly", "COPD", "Nodule/Mass")]
    place = root / "annotations"
    rows = "".join(f"aa,R{number},{cells}\n" for number, cells in enumerate(readers))
    rows += "".join(f"bb,R{number},{votes('No finding')}\n" for number in range(3))
    write(place / "image_labels_train.csv", f"image_id,rad_ID,{','.join(names)}\n{rows}")
    test_names = ",".join(names).replace("Other diseases", "Other disease")  # as it is published
    write(place / "image_labels_test.csv", f"image_id,{test_names}\ncc,{votes('Pleural effusion')}\n")
    write(
        place / "annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
        "aa,R0,ILD,10,20,110.5,220\naa,R1,ILD,12,20,110.5,220\naa,R2,ILD,10,24,110.5,220\n"
        "aa,R0,Cardiomegaly,30,90,130,160\naa,R2,Cardiomegaly,30,92,130,160\naa,R2,Nodule/Mass,5,5,9,9\n"
        "bb,R0,No finding,,,,\nbb,R1,No finding,,,,\nbb,R2,No finding,,,,\n",
    )
    write(
        place / "annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max\ncc,Pleural effusion,10,20,30,40\n",
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
    write(root / "train-rle.csv", "ImageId, EncodedPixels\n1.2.a,-1\n1.2.b,2 3 1020 2\n1.2.b,4096 5\n")
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
