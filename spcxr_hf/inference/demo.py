"""`spcxr demo`: one radiograph through the bundled models; prints results and draws one picture.

run_demo -> example_radiograph, describe_file            the radiograph
         -> install_checkpoints, load_model              the models, by id, out of the local Hub cache; no network
         -> explain, reconstruct, segment_lungs          their answers, as the commands give them
         -> draw_panels, report                          the picture and the text
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spcxr_hf.drawing import overlay, titled_grid, with_words
from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import RESEARCH_NOTICE, write_png
from spcxr_hf.hub.install import install_checkpoints
from spcxr_hf.images.dicom import quiet
from spcxr_hf.images.reader import file_kind, read_radiograph, to_8_bit
from spcxr_hf.inference.explain import draw_explanation, explain
from spcxr_hf.inference.pipeline import load_model
from spcxr_hf.inference.tasks import Reconstruction, reconstruct
from spcxr_hf.models.loading import Loaded, forward, to_pixel_values
from spcxr_hf.models.lungs import LungAreas, measure_lungs, segment_lungs

BASE, LUNGS = "spcxr/base", "spcxr/lung-segmentation"
EXAMPLE = "RG1_UNCR.dcm"  # a chest radiograph, postero-anterior, in the package pydicom-data
GET_DEMO = 'pip install "spcxr-hf[demo]"'
PANEL_WIDTH = 352  # pixels


@dataclass(frozen=True)
class Findings:
    """Results that the demo prints or draws.

    Attributes:
        embedding: (1, D).
        relevance: (rows, columns), each patch's share of what the embedding rests on.
        panels: By title, each (h, w) or (h, w, 3) in 0..1.
    """

    file: str
    models: list[Loaded]
    embedding: torch.Tensor
    relevance: torch.Tensor
    reconstructed: Reconstruction
    lungs: LungAreas
    panels: dict[str, torch.Tensor]
    output: Path
    seconds: float


def run_demo(
    image: Path | None = None, output: Path = Path("spcxr_demo.png"), checkpoints: Path | None = None
) -> Findings:
    """Analyse a radiograph: print the results, write one PNG.

    Args:
        image: PNG, JPEG or DICOM; by default the chest DICOM of pydicom-data.
        output: The PNG.
        checkpoints: Folder with the checkpoints `base` and `lung-segmentation`; by default the source tree's own.

    Raises:
        SpcxrError: the image, a checkpoint or the output cannot be used, or the extra `demo` is not installed.
    """
    started = time.perf_counter()
    if output.suffix.lower() != ".png":
        raise SpcxrError(f"{output}: the picture is a PNG; give a name that ends in .png")
    if not output.resolve().parent.is_dir():
        raise SpcxrError(f"{output}: no such folder to write it to")
    path = example_radiograph() if image is None else Path(image)
    radiograph = read_radiograph(path, full_depth=True)
    installed = [checkpoint.repo_id for checkpoint in install_checkpoints(checkpoints)]
    for repo_id in (BASE, LUNGS):
        if repo_id not in installed:
            raise SpcxrError(f"the demo needs the checkpoint {repo_id}; installed are {', '.join(installed)}")
    base, lungs = load_model("reconstruction", BASE, "cpu"), load_model("segmentation", LUNGS, "cpu")

    pixel_values = to_pixel_values(base.processor, [radiograph])
    relevance = explain(base.model, pixel_values)[0]
    encoder: Any = base.model.base_model
    with torch.inference_mode():
        embedding = forward(encoder, pixel_values).pooler_output
    # "replace", the other fill of the pretraining, takes pixels from a second image.
    (reconstructed,) = reconstruct(base, pixel_values[0], ["noise"])
    mask = segment_lungs(lungs, to_pixel_values(lungs.processor, [radiograph]), [radiograph.size[::-1]])[0]
    panels = draw_panels(radiograph, mask, relevance, reconstructed, output)
    findings = Findings(
        file=describe_file(path, radiograph),
        models=[base, lungs],
        embedding=embedding,
        relevance=relevance,
        reconstructed=reconstructed,
        lungs=measure_lungs(mask.numpy()),
        panels=panels,
        output=output,
        seconds=time.perf_counter() - started,
    )
    print(report(findings))
    return findings


# ---- the radiograph ----------------------------------------------------------------------------------------------


def example_radiograph() -> Path:
    """The path of the radiograph that pydicom-data has installed; it is never downloaded."""
    try:
        from pydicom.data import get_testdata_file
    except ImportError as error:
        raise SpcxrError(f"the example radiograph needs pydicom: {GET_DEMO}, or give a file of your own") from error
    path = get_testdata_file(EXAMPLE, download=False)
    if path is None:
        raise SpcxrError(f"the example radiograph comes with pydicom-data: {GET_DEMO}, or give a file of your own")
    return Path(path)


def describe_file(path: Path, radiograph: Image.Image) -> str:
    """Name, kind, size and depth. Of a DICOM's header only how its pixels are stored."""
    with path.open("rb") as file:
        kind = file_kind(file.read(132), path.name) or "DICOM"
    bits = 16 if radiograph.mode == "I;16" else 8
    if kind == "DICOM":
        import pydicom

        technical = ["BitsStored", "PhotometricInterpretation"]
        with quiet():  # pydicom's warnings quote the header
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=technical)
        kind, bits = f"DICOM {header.PhotometricInterpretation}", header.BitsStored
    return f"{printable(path.name)}  {kind}, {radiograph.width} x {radiograph.height} pixels, {bits} bits"


# ---- the picture and the text ------------------------------------------------------------------------------------


def draw_panels(
    radiograph: Image.Image, lungs: torch.Tensor, relevance: torch.Tensor, reconstructed: Reconstruction, output: Path
) -> dict[str, torch.Tensor]:
    """Write the panels in a row, each in the radiograph's proportions; by title, (h, w) or (h, w, 3) in 0..1."""
    height = round(min(max(PANEL_WIDTH * radiograph.height / radiograph.width, PANEL_WIDTH / 2), 3 * PANEL_WIDTH))
    size = (PANEL_WIDTH, height)
    small = to_8_bit(radiograph).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    grey = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    mask = torch.from_numpy(np.array(Image.fromarray(lungs.numpy()).resize(size, Image.Resampling.NEAREST)))
    masked, peak = reconstructed.mask.float().mean().item(), (relevance.max() / relevance.mean()).item()
    panels = {
        "radiograph": grey,
        "lung mask": overlay(grey, mask),
        f"relevance for the embedding\n(at most {peak:.1f} x the average)": draw_explanation(grey, relevance, mask),
        f"group-masked\n({masked:.0%} of the pixels)": reconstructed.corrupted,
        "reconstructed\n(in the masked groups)": reconstructed.composed,
    }
    picture = titled_grid([list(panels.values())], [list(panels)], size)
    write_png(with_words(picture, [f"{RESEARCH_NOTICE.capitalize()}."]), output)
    return panels


def report(findings: Findings) -> str:
    """The findings as aligned lines."""
    rows = [("radiograph", findings.file)]
    for loaded in findings.models:
        repo_id, _, revision = loaded.name.partition("@")
        millions = loaded.model.num_parameters() / 1e6
        what = f"{type(loaded.model).__name__}, {millions:.1f} M parameters, revision {revision}"
        rows.append(("model", f"{repo_id}  {what}"))
    embedding, lungs = findings.embedding, findings.lungs
    rows.append(("embedding", f"shape {tuple(embedding.shape)}, L2 norm {embedding.norm():.3f}"))
    rows.append(("lung area", f"{lungs.total:6.2%} of the image" if lungs.total else "none found"))
    islands = lungs.total - lungs.image_left - lungs.image_right
    for name, patient, area in (
        ("  image left", " (the patient's right in a frontal view)", lungs.image_left),
        ("  image right", " (the patient's left in a frontal view)", lungs.image_right),
        ("  in islands", "", islands if islands > 1e-4 else 0),
    ):
        if lungs.total and (patient or area):
            share = f"{area:6.2%} of the image, {area / lungs.total:5.1%} of the lung area"
            rows.append((name, share + patient))
    masked, error = findings.reconstructed.mask.float().mean().item(), findings.reconstructed.error
    rows.append(("reconstruction", f"{masked:.1%} of the pixels masked, mean absolute error {error:.3f} (grey 0..1)"))
    rows += [("picture", printable(str(findings.output))), ("time", f"{findings.seconds:.1f} s")]
    return "\n".join([*(f"{name:<16}{value}" for name, value in rows), "", f"{RESEARCH_NOTICE.capitalize()}."])
