"""The command line: what it prints, and one line instead of a traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

import spcxr_hf
from spcxr_hf import SpcxrForImageClassification, SpcxrForPreTraining, SpcxrForSemanticSegmentation, cli
from spcxr_hf.data.table import structure_masks
from spcxr_hf.files import locked
from spcxr_hf.inference import pipeline, tasks, writers
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessorPil
from tests.hub.test_install import make_checkpoint
from tests.images.test_dicom import dataset, raw
from tests.inference.test_pipeline import save_model, save_pictures
from tests.made_up import picture


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_model(SpcxrForImageClassification, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    names = {0: "background", 1: "lung"}
    return save_model(SpcxrForSemanticSegmentation, tmp_path_factory.mktemp("segmenter"), id2label=names)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return save_model(SpcxrForPreTraining, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def run_main(monkeypatch, *arguments) -> int:
    """The exit status of `spcxr ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["spcxr", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_version():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"spcxr {spcxr_hf.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--help", ["demo", "install", "--version"]),
        ("demo", ["IMAGE", "--output", "--checkpoints"]),
        ("install", ["--force"]),
    ],
)
def test_help_names_everything(command, words):
    found = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert found.exit_code == 0
    assert [word for word in words if word not in found.output] == []


def test_install_says_what_is_where(tmp_path, cache, monkeypatch, capsys):
    make_checkpoint(tmp_path / "model_cards" / "base")
    for state in ("installed", "already there"):
        assert run_main(monkeypatch, "install", "--checkpoints", tmp_path / "model_cards") == 0
        revision = (cache / "models--spcxr--base" / "refs" / "main").read_text()
        printed = capsys.readouterr()
        assert printed.out == f"spcxr/base  revision {revision}  {state}\n"
        assert "HF_HUB_OFFLINE=1" in printed.err


def test_install_forces_only_when_told(tmp_path, cache, monkeypatch, capsys):
    make_checkpoint(tmp_path / "model_cards" / "base")
    main = cache / "models--spcxr--base" / "refs" / "main"
    make_checkpoint(main.parent.parent / "snapshots" / ("0" * 40), value=2.0)
    main.parent.mkdir()
    main.write_text("0" * 40)
    install = ["install", "--checkpoints", tmp_path / "model_cards"]
    assert run_main(monkeypatch, *install) == 1
    assert main.read_text() == "0" * 40
    assert "spcxr install --force" in capsys.readouterr().err
    assert run_main(monkeypatch, *install, "--force") == 0
    assert main.read_text() != "0" * 40


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.png", None, "No such file"),
        ("text.png", b"no picture", "not a PNG, JPEG, TIFF, WebP, BMP or DICOM file"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
        ("cut.dcm", b"\0" * 128 + b"DICM", "DICOM file"),
    ],
)
def test_a_bad_file_is_one_line_on_stderr(tmp_path, monkeypatch, capsys, name, content, complaint):
    pytest.importorskip("pydicom")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run_main(monkeypatch, "demo", tmp_path / name, "--output", tmp_path / "out.png") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {tmp_path / name}: ")
    assert complaint in printed.err
    assert not (tmp_path / "out.png").exists()


def test_demo_hands_everything_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("spcxr_hf.inference.demo.run_demo", lambda *given: calls.append(given))
    cards, output = tmp_path / "cards", tmp_path / "out.png"
    assert run_main(monkeypatch, "demo", tmp_path / "in.png", "--output", output, "--checkpoints", cards) == 0
    assert calls == [(tmp_path / "in.png", output, cards)]


# Many files through a model


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_flags_may_be_written_with_underscores(tmp_path, segmenter, monkeypatch, capsys):
    """In names alone: a value keeps its own."""
    save_pictures(tmp_path / "my_scans", 1)
    words = ["segment", tmp_path / "my_scans", "--model", segmenter, "--masks", tmp_path / "my_masks"]
    assert run_main(monkeypatch, *words, "--batch_size", 1, "--mask_format=png", "--json") == 0
    (record,) = lines(capsys.readouterr().out)
    assert record["mask"] == str(tmp_path / "my_masks" / "0.png")


def test_without_a_model_the_heads_are_listed(tmp_path, monkeypatch, capsys):
    for name, use in (("child", {"population": "children of 1 to 5 years"}), ("any", {})):
        save_model(SpcxrForImageClassification, tmp_path / "cards" / name, **({"intended_use": use} if use else {}))
    monkeypatch.setattr(pipeline, "BUNDLED", tmp_path / "cards")
    capsys.readouterr()  # what saving prints
    for command in ("predict", "explain"):
        assert run_main(monkeypatch, command, tmp_path) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines()[1:] == [
            "  spcxr/any            population not stated: normal, bacterial, viral",
            "  spcxr/child          children of 1 to 5 years: normal, bacterial, viral",
        ]


def test_another_age_or_view_than_the_model_s_is_a_warning(tmp_path, monkeypatch, capsys):
    """In the record of that file, without the header's own values."""
    pytest.importorskip("pydicom")
    use = {"population": "children of 1 to 5 years", "ages": [1, 5], "views": ["PA"]}
    model = save_model(SpcxrForImageClassification, tmp_path / "model", intended_use=use)
    headers = {
        "adult": {"PatientAge": "064Y"},
        "infant": {"PatientAge": "003M"},
        "born": {"PatientBirthDate": "19500101", "StudyDate": "20200101"},
        "five": {"PatientAge": "005Y", "ViewPosition": "PA"},
        "ap": {"PatientAge": "002Y", "ViewPosition": "AP"},
        "silent": {},
    }
    for name, header in headers.items():
        made = dataset(picture(1, 48)[0].copy(), 8, WindowCenter=128, WindowWidth=256, **header)
        (tmp_path / f"{name}.dcm").write_bytes(raw(made))
    assert run_main(monkeypatch, "predict", *(tmp_path / f"{name}.dcm" for name in headers), "--model", model) == 0
    printed = capsys.readouterr()
    found = {Path(record["path"]).stem: record for record in lines(printed.out)}
    said = {name: [text for text in record["warnings"] if "made for" in text] for name, record in found.items()}
    age = ["this model was made for children of 1 to 5 years, and the header gives another age"]
    view = ["this model was made for children of 1 to 5 years, PA views, and the header gives another view"]
    assert said == {"adult": age, "infant": age, "born": age, "five": [], "ap": view, "silent": []}
    assert {record["population"] for record in found.values()} == {"children of 1 to 5 years"}
    assert "064" not in printed.out


def test_what_a_folder_holds_and_is_not_read_is_counted(tmp_path, classifier, monkeypatch, capsys):
    save_pictures(tmp_path / "scans", 2)
    save_pictures(tmp_path / "elsewhere", 1)
    for name in ("a.gif", "b.GIF", "notes.txt", "DICOMDIR", ".hidden.gif"):
        (tmp_path / "scans" / name).write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "scans" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "scans" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    kinds = ["1 link(s) to nowhere or special file(s)", "1 linked folder(s)", "2 .gif file(s)"]
    words = {"predict": ["--model", classifier], "audit": ["--output", tmp_path / "audit"]}
    for command, options in words.items():
        assert run_main(monkeypatch, command, tmp_path / "scans", *options) == 3
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if " left out, the first: " in line]
        assert sorted(line.partition(": ")[2].partition(" left out")[0] for line in said) == kinds
        if command == "predict":
            assert len(lines(printed.out)) == 2 and "; 4 left out" in printed.err


def test_a_second_run_into_the_same_file_is_told_who_holds_it(tmp_path, classifier, monkeypatch, capsys):
    save_pictures(tmp_path / "scans", 2)
    output = tmp_path / "out.csv"
    words = ["predict", tmp_path / "scans", "--model", classifier, "--output", output, "--resume"]
    with locked(tmp_path, output.name):
        assert run_main(monkeypatch, *words) == 1
    assert f"error: {output}: in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not output.exists()
    for _ in range(2):  # the second run finds nothing to do and adds no header
        assert run_main(monkeypatch, *words) == 0
    assert output.read_text().count("path,") == 1
    assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == []


def test_predict_to_a_pipe_is_json_lines_and_nothing_else(tmp_path, classifier, monkeypatch, capsys):
    save_pictures(tmp_path / "scans", 3)
    assert run_main(monkeypatch, "predict", tmp_path / "scans", "--model", classifier, "--batch-size", 2) == 0
    printed = capsys.readouterr()
    assert [Path(record["path"]).name for record in lines(printed.out)] == ["0.png", "1.png", "2.png"]
    assert "Research use only, not for clinical use." in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize(("broken", "status"), [([], 0), ([1], 3), ([0, 1, 2], 1)])
def test_exit_status_tells_of_broken_files(tmp_path, classifier, monkeypatch, capsys, broken, status):
    paths = save_pictures(tmp_path / "scans", 3)
    for index in broken:
        paths[index].write_bytes(b"no picture")
    assert run_main(monkeypatch, "predict", tmp_path / "scans", "--model", classifier) == status
    printed = capsys.readouterr()
    assert len(lines(printed.out)) == 3 - len(broken)
    assert printed.err.count("error: ") == len(broken)


def test_odd_names_are_read_written_and_shown(tmp_path, classifier, monkeypatch, capsys):
    names = ["-dash.png", "sp ace.png", "[b].png", "a*b?.png", "ünï.png", "new\nline.png", "\x1b[31m.png"]
    for name, path in zip(names, save_pictures(tmp_path / "scans", len(names)), strict=True):
        path.rename(path.with_name(name))
    (tmp_path / "scans" / "\x1b[7m\n.png").write_bytes(b"no picture")
    output = tmp_path / "out.csv"
    words = ["predict", tmp_path / "scans", "--model", classifier, "--output", output]
    assert run_main(monkeypatch, *words) == 3
    told = capsys.readouterr().err
    assert r"\x1b[7m\n.png: not a PNG" in told and "\x1b" not in told
    assert {Path(path).name for path in writers.finished(output, "csv", str(classifier))} == set(names)
    assert run_main(monkeypatch, "predict", tmp_path / "scans" / "[b].png", "--model", classifier) == 0
    assert len(lines(capsys.readouterr().out)) == 1
    assert run_main(monkeypatch, "predict", str(tmp_path / "scans" / "*.dcm"), "--model", classifier) == 1
    assert "no file has such a name" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_name_that_is_no_text_is_told_and_the_others_go_on(tmp_path, classifier, monkeypatch, capsys, kind):
    paths, output = save_pictures(tmp_path / "scans", 2), tmp_path / f"out.{kind}"
    paths[0].rename(os.fsdecode(os.fsencode(paths[0].parent) + b"/\xff.png"))
    words = ["predict", tmp_path / "scans", "--model", classifier, "--output", output]
    assert run_main(monkeypatch, *words) == 3
    assert r"\udcff.png: the name is not valid UTF-8; rename the file" in capsys.readouterr().err
    assert writers.finished(output, kind, str(classifier)) == {str(paths[1])}


def test_resume_repeats_nothing(tmp_path, pretrained, monkeypatch, capsys):
    paths, output = save_pictures(tmp_path / "scans", 4), tmp_path / "out.parquet"
    paths[3].rename(tmp_path / "later.png")
    embed = ["embed", tmp_path / "scans", "--model", pretrained, "--output", output]
    assert run_main(monkeypatch, *embed) == 0
    (tmp_path / "later.png").rename(paths[3])
    assert run_main(monkeypatch, *embed) == 1
    assert "--resume continues it" in capsys.readouterr().err
    assert run_main(monkeypatch, *embed, "--resume") == 0
    assert "1 image in" in (told := capsys.readouterr().err)
    assert "3 were done before" in told
    assert pq.read_table(output)["path"].to_pylist() == [str(path) for path in paths]


def test_segment_writes_masks_and_areas(tmp_path, segmenter, monkeypatch, capsys):
    paths = save_pictures(tmp_path / "scans" / "sub", 2)
    words = ["segment", tmp_path / "scans", "--model", segmenter, "--masks", tmp_path / "masks"]
    assert run_main(monkeypatch, *words) == 0
    for path, record in zip(paths, lines(capsys.readouterr().out), strict=True):
        mask = Image.open(record["mask"])
        assert record["mask"] == str(tmp_path / "masks" / "sub" / path.name)
        assert mask.size == Image.open(path).size
        assert set(np.unique(mask)) <= {0, 255}
    (tmp_path / "masks" / "sub" / "1.png").unlink()
    assert run_main(monkeypatch, *words, "--resume") == 0
    assert [Path(record["path"]).name for record in lines(capsys.readouterr().out)] == ["1.png"]
    assert run_main(monkeypatch, *words) == 1
    assert "--overwrite makes all anew" in capsys.readouterr().err
    assert run_main(monkeypatch, *words[:-1], tmp_path / "scans", "--overwrite") == 1
    assert "would be written over an input" in capsys.readouterr().err


def test_segment_dicom(tmp_path, segmenter, monkeypatch, capsys):
    pytest.importorskip("highdicom")
    store = pytest.importorskip("pydicom.data")
    import pydicom

    source = store.get_testdata_file("RG1_UNCR.dcm", download=False)
    if source is None:
        pytest.skip("pydicom-data is not installed")
    (png,) = save_pictures(tmp_path, 1)
    words = ["segment", png, source, "--model", segmenter, "--masks", tmp_path / "masks", "--mask-format", "seg"]
    assert run_main(monkeypatch, *words) == 3
    printed = capsys.readouterr()
    assert f"error: {png}: not a DICOM file, and a DICOM segmentation must refer to one" in printed.err
    (record,) = lines(printed.out)
    made, original = pydicom.dcmread(record["mask"]), pydicom.dcmread(source)
    assert (made.Modality, made.StudyInstanceUID) == ("SEG", original.StudyInstanceUID)
    assert (made.Rows, made.Columns) == (original.Rows, original.Columns)
    assert made.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == (
        original.SOPInstanceUID
    )
    assert made.pixel_array.mean() == pytest.approx(record["lung_area"]["total"])
    assert "research use only" in made.ContentDescription


ANATOMY = ("left lung", "right lung", "heart", "left clavicle", "right clavicle")


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anatomy")
    names = dict(enumerate(ANATOMY))
    return save_model(SpcxrForSemanticSegmentation, folder, id2label=names, problem_type="multi_label_classification")


def test_segment_structures(tmp_path, anatomy, monkeypatch, capsys):
    paths = save_pictures(tmp_path / "scans", 2)
    words = ["segment", tmp_path / "scans", "--model", anatomy, "--masks", tmp_path / "masks"]
    assert run_main(monkeypatch, *words, "--drawings", tmp_path / "drawn") == 0
    for path, record in zip(paths, lines(capsys.readouterr().out), strict=True):
        masks = structure_masks(torch.from_numpy(np.array(Image.open(record["mask"]))), 5)
        assert masks.shape == (5, *Image.open(path).size[::-1])
        assert list(record["area"]) == list(ANATOMY)
        assert list(record["area"].values()) == pytest.approx(masks.float().mean(dim=(1, 2)).tolist())
        assert record["lung_area"]["total"] == pytest.approx((masks[0] | masks[1]).float().mean().item())
        by_name = dict(zip(ANATOMY, masks, strict=True))
        assert record["cardiothoracic_ratio"] == SpcxrImageProcessorPil.cardiothoracic_ratio(by_name)
        drawing = np.asarray(Image.open(record["picture"])).astype(int)
        assert drawing.shape == (448, 448, 3) and np.ptp(drawing, axis=2).max() > 50  # there is colour
    dotted = [paths[0].rename(paths[0].with_name("1.2.3")), paths[1].rename(paths[1].with_name("1.2.4"))]
    others = ["segment", *dotted, "--model", anatomy, "--masks", tmp_path / "more", "--drawings", tmp_path / "others"]
    assert run_main(monkeypatch, *others) == 0
    drawn = [Path(record["picture"]).name for record in lines(capsys.readouterr().out)]
    assert drawn == ["1.2.3.png", "1.2.4.png"]
    dotted[0].rename(paths[0])
    assert run_main(monkeypatch, *words, "--overwrite", "--output", tmp_path / "a.csv") == 0
    header = (tmp_path / "a.csv").read_text().splitlines()[0].split(",")
    assert {"cardiothoracic_ratio", "area.heart", "lung_area.total"} <= set(header) and "picture" not in header


def test_segment_structures_as_dicom(tmp_path, anatomy, monkeypatch):
    highdicom = pytest.importorskip("highdicom")
    import pydicom

    made = dataset(picture(1, 48)[0].copy(), 8, WindowCenter=128, WindowWidth=256)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(made, name, pydicom.uid.generate_uid())
    (tmp_path / "a.dcm").write_bytes(raw(made))
    words = ["segment", tmp_path / "a.dcm", "--model", anatomy, "--masks", tmp_path / "masks"]
    assert run_main(monkeypatch, *words, "--mask-format", "seg") == 0
    assert run_main(monkeypatch, *words) == 0
    found = highdicom.seg.segread(tmp_path / "masks" / "a.dcm")
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == [name.capitalize() for name in ANATOMY]
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in found.SegmentSequence]
    assert [kind.CodeValue for kind in kinds] == ["39607008", "39607008", "80891009", "51299004", "51299004"]
    sides = [kind.get("SegmentedPropertyTypeModifierCodeSequence") for kind in kinds]
    assert [side and side[0].CodeMeaning for side in sides] == ["Left", "Right", None, "Left", "Right"]
    bits = torch.from_numpy(np.array(Image.open(tmp_path / "masks" / "a.dcm.png")))
    assert np.array_equal(found.pixel_array, structure_masks(bits, 5).numpy())


def test_a_dicom_segmentation_holds_of_the_patient_what_the_standard_requires(tmp_path, segmenter, monkeypatch):
    """PS3.3 C.7.1.1 and C.7.2.1, types 1 and 2."""
    pytest.importorskip("highdicom")
    import pydicom

    kept = {"PatientID": "id7", "PatientName": "A^B", "PatientBirthDate": "20010203", "PatientSex": "F",
            "StudyID": "s9", "StudyDate": "20200101", "AccessionNumber": "acc5"}  # fmt: skip
    dropped = {"Occupation": "OCCUPATION", "AdditionalPatientHistory": "HISTORY", "PatientComments": "COMMENTS",
               "ReferringPhysicianName": "REFERRING", "PhysiciansOfRecord": "RECORD", "EthnicGroup": "ETHNIC",
               "NameOfPhysiciansReadingStudy": "READING", "OtherPatientIDs": "OTHER", "PatientAge": "019Y",
               "StudyDescription": "DESCRIPTION", "AdmittingDiagnosesDescription": "DIAGNOSES"}  # fmt: skip
    made = dataset(picture(1, 48)[0].copy(), 8, WindowCenter=128, WindowWidth=256, **kept, **dropped)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(made, name, pydicom.uid.generate_uid())
    (tmp_path / "a.dcm").write_bytes(raw(made))
    words = ["segment", tmp_path / "a.dcm", "--model", segmenter, "--masks", tmp_path / "masks", "--mask-format", "seg"]
    assert run_main(monkeypatch, *words) == 0
    mask = pydicom.dcmread(tmp_path / "masks" / "a.dcm")
    assert {name: str(mask.get(name)) for name in kept} == kept
    assert str(mask.ReferringPhysicianName) == ""
    assert [name for name in dropped if mask.get(name)] == []
    content = (tmp_path / "masks" / "a.dcm").read_bytes()
    assert [value for value in dropped.values() if value.encode() in content] == []


def test_reconstruct_and_explain_draw(tmp_path, pretrained, classifier, segmenter, monkeypatch, capsys):
    (path,) = save_pictures(tmp_path, 1)
    folder = tmp_path / "pictures"
    assert run_main(monkeypatch, "reconstruct", path, "--model", pretrained, "--pictures", folder / "r") == 0
    explain = ["explain", path, "--model", classifier, "--lungs", segmenter, "--pictures", folder / "e"]
    assert run_main(monkeypatch, *explain) == 0
    reconstructed, explained = lines(capsys.readouterr().out)
    assert list(reconstructed["fills"]) == ["noise", "zeros", "block"]
    assert Image.open(explained["picture"]).width == 448
    no_lungs = ["--lungs", "none", "--overwrite", "--target", "embedding"]
    assert run_main(monkeypatch, *explain[:4], *explain[6:], *no_lungs) == 0


def test_two_files_with_one_picture_are_refused(tmp_path, segmenter, monkeypatch, capsys):
    one, two = save_pictures(tmp_path / "a", 1)[0], save_pictures(tmp_path / "b", 1)[0]
    assert run_main(monkeypatch, "segment", one, two, "--model", segmenter, "--masks", tmp_path / "masks") == 1
    assert "give the folder above them" in capsys.readouterr().err


def test_a_mask_that_is_made_again_has_one_record(tmp_path, segmenter, monkeypatch):
    save_pictures(tmp_path / "scans", 2)
    words = ["segment", tmp_path / "scans", "--model", segmenter, "--masks", tmp_path / "masks"]
    words += ["--output", tmp_path / "areas.csv"]
    assert run_main(monkeypatch, *words) == 0
    before = (tmp_path / "areas.csv").read_text()
    (tmp_path / "masks" / "0.png").unlink()
    assert run_main(monkeypatch, *words, "--resume") == 0
    assert (tmp_path / "masks" / "0.png").is_file()
    assert (tmp_path / "areas.csv").read_text() == before


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_ctrl_c_leaves_whole_records(tmp_path, pretrained, monkeypatch, capsys, kind):
    save_pictures(tmp_path / "scans", 8)
    output, batches = tmp_path / f"out.{kind}", []
    embed = tasks.embed

    def interrupted(loaded, batch):
        batches.append(batch)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return embed(loaded, batch)

    monkeypatch.setattr(tasks, "embed", interrupted)
    words = ["embed", tmp_path / "scans", "--model", pretrained, "--batch-size", 2, "--output", output]
    assert run_main(monkeypatch, *words) == 130
    assert "interrupted; what is written is whole" in capsys.readouterr().err
    assert len(writers.finished(output, kind, str(pretrained))) == 4
    assert run_main(monkeypatch, *words, "--resume") == 0
    assert len(writers.finished(output, kind, str(pretrained))) == 8
    assert len(batches) == 4


def test_audit_reads_a_folder_of_classes_as_the_scripts_do(tmp_path, monkeypatch, capsys):
    for seed, place in enumerate(("train/normal", "train/pneumonia", "val/normal", "val/pneumonia")):
        (tmp_path / "set" / place).mkdir(parents=True)
        Image.fromarray(picture(seed)[0]).save(tmp_path / "set" / place / f"{seed}.png")
    options = ["--split", "split", "--label", "label", "--copies-list", tmp_path / "copies.txt"]
    assert run_main(monkeypatch, "audit", tmp_path / "set", *options, "--output", tmp_path / "audit") == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["labels"]["label"] == {"normal": {"train": 1, "val": 1}, "pneumonia": {"train": 1, "val": 1}}
    assert (tmp_path / "copies.txt").read_text().startswith("# 0 copies")


def test_audit_takes_single_files(tmp_path, monkeypatch, capsys):
    paths = save_pictures(tmp_path, 3)
    paths[1].write_bytes(b"no picture")
    assert run_main(monkeypatch, "audit", *paths, "--output", tmp_path / "audit") == 3
    assert capsys.readouterr().out == f"{tmp_path / 'audit' / 'audit.html'}\n"
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["broken"]
    stop = ["--output", tmp_path / "stopped", "--on-error", "stop"]
    assert run_main(monkeypatch, "audit", *paths, *stop) == 1
    assert not (tmp_path / "stopped" / "audit.json").exists()
    assert run_main(monkeypatch, "audit", *paths, *stop[:-1], "never") == 1
    assert "on_error must be stop or skip; got 'never'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--to", "--format"])
def test_export_hands_everything_on(tmp_path, monkeypatch, flag):
    calls = []
    monkeypatch.setattr("spcxr_hf.hub.export.export_vit", lambda *given, **named: calls.append((given, named)))
    assert run_main(monkeypatch, "export", "spcxr/base", flag, "vit", "--output", tmp_path, "--channels", 1) == 0
    assert calls == [(("spcxr/base", tmp_path), {"num_channels": 1})]
    assert run_main(monkeypatch, "export", "spcxr/base", flag, "pdf", "--output", tmp_path) == 1
    assert run_main(monkeypatch, "export", "spcxr/base", flag, "vit", "--quantize", "--output", tmp_path) == 1
    assert run_main(monkeypatch, "export", "spcxr/base", "--output", tmp_path, "--reduce-range") == 1


@pytest.mark.parametrize("without", [True, False])
def test_export_in_eight_bits(tmp_path, monkeypatch, capsys, without):
    """Where 8 bits can overflow, a session's option and 7 bits are named."""
    calls = []
    monkeypatch.setattr("spcxr_hf.hub.export_onnx.export_onnx", lambda model, folder, **named: folder / "model.onnx")
    monkeypatch.setattr("spcxr_hf.hub.export_onnx.quantize_int8", lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr("spcxr_hf.hub.export_onnx.lacks_vnni", lambda: without)
    words = ("export", "spcxr/base", "--output", tmp_path, "--quantize")
    assert run_main(monkeypatch, *words) == 0
    told = capsys.readouterr().err
    assert ("no VNNI" in told) == ("session.x64quantprecision=1" in told) == without
    assert run_main(monkeypatch, *words, "--reduce-range") == 0
    assert "no VNNI" not in capsys.readouterr().err
    assert calls == [((tmp_path / "model.onnx",), {"reduce_range": reduced}) for reduced in (False, True)]


def test_export_says_what_a_plain_vit_cannot_be(classifier, tmp_path, monkeypatch, capsys):
    words = ("export", classifier, "--format", "vit", "--output", tmp_path / "vit")
    assert run_main(monkeypatch, *words) == 1
    assert "a classifier over the mean of the patch tokens cannot be a ViTForImage" in capsys.readouterr().err
    assert not (tmp_path / "vit").exists()


def test_publish_hands_everything_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("spcxr_hf.hub.publish.publish", lambda *given, **named: calls.append((given, named)) or [])
    assert run_main(monkeypatch, "publish", "base", "--namespace", "lab", "--dry-run", "--checkpoints", tmp_path) == 0
    assert calls == [((tmp_path, "lab", False, True), {"tag": None, "only": ["base"]})]


# Help


@pytest.mark.parametrize("command", [one.callback.__name__ for one in cli.app.registered_commands if not one.name])
def test_every_command_shows_an_example(command):
    found = CliRunner().invoke(cli.app, [command, "--help"])
    assert found.exit_code == 0
    assert f"Example:\n    spcxr {command}" in found.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("spcxr pre", ["predict", "pretrain"]),
        ("spcxr predict --model spcxr/s", ["spcxr/screening"]),
        ("spcxr reconstruct --fill ", ["noise", "zeros", "block", "replace"]),
        ("spcxr segment --mask-format s", ["seg"]),
    ],
)
def test_the_shell_completes(words, found):
    command = str(Path(sys.executable).with_name("spcxr"))
    asked = {"_SPCXR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([command], capture_output=True, text=True, env={**os.environ, **asked}, check=True)
    assert done.stdout.split() == found


@pytest.mark.slow
def test_the_command_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['/usr/bin/spcxr', '--help']\n"
        "from spcxr_hf.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'pydicom') if name in sys.modules])\n"
        "import spcxr_hf; from transformers import AutoConfig\n"
        "assert spcxr_hf.SpcxrModel and AutoConfig.for_model('spcxr')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Exit status:" in done.stdout
