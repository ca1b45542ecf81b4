"""The main job: one radiograph through the bundled models, to numbers and one picture.

run_demo -> example_radiograph, describe_file    what is looked at
         -> install_checkpoints, load            the models, by id, out of the local Hub cache; no network
         -> encode, reconstruct, segment_lungs   what the models see
         -> compose_panels, draw                 the picture
         -> report                               the text
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from spcxr_hf.drawing import overlay, to_grey
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE
from spcxr_hf.hub.install import install_checkpoints
from spcxr_hf.images.dicom import quiet
from spcxr_hf.images.reader import file_kind, read_radiograph
from spcxr_hf.inference.pipeline import load_model
from spcxr_hf.models.loading import Loaded, forward, to_pixel_values
from spcxr_hf.models.lungs import LungAreas, measure_lungs, segment_lungs
from spcxr_hf.transforms.group_masking import GroupMasking, as_pixels

BASE, LUNGS = "spcxr/base", "spcxr/lung-segmentation"
EXAMPLE = "RG1_UNCR.dcm"  # a chest radiograph, postero-anterior, in the package pydicom-data
GET_DEMO = 'pip install "spcxr-hf[demo]"'

SEED = 0
PANEL_INCHES, WORDS_INCHES, DOTS_PER_INCH = 3.2, 0.7, 110


class Encoded(NamedTuple):
    """`embedding` (1, D), and `attention` (rows, columns): how much each patch enters it, 1 being the average."""

    embedding: torch.Tensor
    attention: torch.Tensor


class Reconstructed(NamedTuple):
    """Grey values (H, W) in 0..1 at the model's size; `composed` has the reconstruction where `mask` (H, W) is true."""

    corrupted: torch.Tensor
    composed: torch.Tensor
    mask: torch.Tensor
    error: float  # mean absolute error over the corrupted pixels, on the scale 0..1


@dataclass(frozen=True)
class Findings:
    """Everything that the demo prints or draws."""

    file: str
    models: list[Loaded]
    encoded: Encoded
    reconstructed: Reconstructed
    lungs: LungAreas
    panels: dict[str, np.ndarray]  # by title, each (h, w) or (h, w, 3) in 0..1
    output: Path
    seconds: float


def run_demo(
    image: Path | None = None, output: Path = Path("spcxr_demo.png"), checkpoints: Path | None = None
) -> Findings:
    """Look at a radiograph: print what is found, write one PNG.

    Args:
        image: PNG, JPEG or DICOM; by default the chest DICOM of pydicom-data.
        output: the PNG.
        checkpoints: folder with the checkpoints `base` and `lung-segmentation`; by default the source tree's own.

    Raises:
        SpcxrError: the image, a checkpoint or the output cannot be used, or the extra `demo` is not installed.
    """
    started = time.perf_counter()
    check_output(output)
    path = example_radiograph() if image is None else Path(image)
    radiograph = read_radiograph(path, full_depth=True)
    install(checkpoints)
    base, lungs = load_model("reconstruction", BASE, "cpu"), load_model("segmentation", LUNGS, "cpu")

    encoded = encode(base, radiograph)
    reconstructed = reconstruct(base, radiograph)
    size = (radiograph.height, radiograph.width)
    lung_mask = segment_lungs(lungs, to_pixel_values(lungs.processor, [radiograph]), [size])[0]
    panels = compose_panels(radiograph, lung_mask, encoded.attention, reconstructed)
    draw(panels, radiograph.size, output)
    findings = Findings(
        file=describe_file(path, radiograph),
        models=[base, lungs],
        encoded=encoded,
        reconstructed=reconstructed,
        lungs=measure_lungs(lung_mask.numpy()),
        panels=panels,
        output=output,
        seconds=time.perf_counter() - started,
    )
    print(report(findings))
    return findings


# ---- what is looked at -------------------------------------------------------------------------------------------


def check_output(output: Path) -> None:
    """Refuse early what would fail after the work."""
    if output.suffix.lower() != ".png":
        raise SpcxrError(f"{output}: the picture is a PNG; give a name that ends in .png")
    if not output.resolve().parent.is_dir():
        raise SpcxrError(f"{output}: no such folder to write it to")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpcxrError(f"the picture needs matplotlib: {GET_DEMO}") from error


def install(checkpoints: Path | None) -> None:
    """Put the checkpoints of a folder into the local Hub cache, and see that those the demo needs are there."""
    installed = [checkpoint.repo_id for checkpoint in install_checkpoints(checkpoints)]
    for repo_id in (BASE, LUNGS):
        if repo_id not in installed:
            raise SpcxrError(f"the demo needs the checkpoint {repo_id}; installed are {', '.join(installed)}")


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
    """Name, kind, size and depth. Of a DICOM's header only what says how its pixels are stored."""
    with path.open("rb") as file:
        kind = file_kind(file.read(132), path.name) or "DICOM"
    bits = 16 if radiograph.mode == "I;16" else 8
    if kind == "DICOM":
        import pydicom

        technical = ["BitsStored", "PhotometricInterpretation"]
        with quiet():  # pydicom's warnings repeat what stands in the header
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=technical)
        kind, bits = f"DICOM {header.PhotometricInterpretation}", header.BitsStored
    return f"{path.name}  {kind}, {radiograph.width} x {radiograph.height} pixels, {bits} bits"


# ---- the models --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(base: Loaded, radiograph: Image.Image) -> Encoded:
    """The embedding, and where it comes from.

    The embedding is the mean of the patch tokens. In the last block, a token is a sum over all patches, weighted by its
    attention to each: so the attention to a patch, averaged over the tokens and the heads, is the weight with which
    that patch's content enters the embedding there. It tells where the block looks, not what it concludes.
    """
    pixel_values = to_pixel_values(base.processor, [radiograph])  # (1, C, H, W)
    outputs = forward(base.model.base_model, pixel_values, output_attentions=True)
    weights = outputs.attentions[-1].mean(dim=1)[0, 1:, 1:].mean(dim=0)  # (N,), CLS left out on both sides
    patch = base.model.config.patch_size
    rows, columns = (side // patch for side in pixel_values.shape[-2:])
    return Encoded(outputs.pooler_output, (weights / weights.mean()).reshape(rows, columns))


@torch.inference_mode()
def reconstruct(base: Loaded, radiograph: Image.Image) -> Reconstructed:
    """Corrupt groups of pixels by noise, the same ones at every start, and let the model fill them in."""
    clean = to_pixel_values(base.processor, [radiograph])
    # "replace", the other fill of the pretraining, takes pixels from a second image.
    corrupted, mask = GroupMasking(fill_modes=("noise",))(clean, torch.Generator().manual_seed(SEED))
    reconstruction = as_pixels(base.model.config, forward(base.model, corrupted).reconstruction, clean)
    composed = torch.where(mask, reconstruction, clean)
    mean, std = base.processor.image_mean[0], base.processor.image_std[0]
    grey, corrupted_grey, composed_grey = (to_grey(values, mean, std)[0] for values in (clean, corrupted, composed))
    pixel_mask = mask[0, 0]
    error = (composed_grey - grey).abs()[pixel_mask].mean().item()
    return Reconstructed(corrupted_grey, composed_grey, pixel_mask, error)


# ---- the picture -------------------------------------------------------------------------------------------------


def compose_panels(
    radiograph: Image.Image, lung_mask: torch.Tensor, attention: torch.Tensor, reconstructed: Reconstructed
) -> dict[str, np.ndarray]:
    """Title -> panel, (h, w) or (h, w, 3) in 0..1."""
    white = 65535 if radiograph.mode == "I;16" else 255
    grey = torch.from_numpy(np.asarray(radiograph, dtype=np.float32) / white)
    share = reconstructed.mask.float().mean().item()
    panels = {
        "radiograph": grey,
        "lung mask": overlay(grey, lung_mask),
        f"attention, last block\n(at most {attention.max():.1f} x the average)": heat_map(grey, attention),
        f"group-masked\n({share:.0%} of the pixels)": reconstructed.corrupted,
        "reconstructed\n(in the masked groups)": reconstructed.composed,
    }
    return {title: panel.numpy() for title, panel in panels.items()}


def heat_map(grey: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The attention (rows, columns), from none to its largest value, in colour over grey (h, w) -> (h, w, 3)."""
    from matplotlib import colormaps

    heat = torch.nn.functional.interpolate(attention[None, None], size=grey.shape, mode="bilinear", align_corners=False)
    heat = heat[0, 0] / attention.max()
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    return 0.5 * grey.unsqueeze(-1) + 0.5 * colour


def draw(panels: dict[str, np.ndarray], size: tuple[int, int], output: Path) -> None:
    """Write the panels in a row, each in the proportions of `size` (width, height)."""
    from matplotlib.figure import Figure  # a figure of its own touches no global state

    width, height = size
    panel_height = min(max(PANEL_INCHES * height / width, 1.5), 3 * PANEL_INCHES)
    figure = Figure(
        figsize=(PANEL_INCHES * len(panels), panel_height + WORDS_INCHES), dpi=DOTS_PER_INCH, layout="constrained"
    )
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        # The model sees a square; the extent gives its pictures the radiograph's proportions back.
        axes.imshow(panel, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        axes.set_anchor("S")  # what is left over goes above, to the titles
    figure.supxlabel(f"{RESEARCH_NOTICE.capitalize()}.", fontsize=9)
    try:
        figure.savefig(output)
    except OSError as error:
        raise SpcxrError(f"{output}: {error.strerror or type(error).__name__}") from error


# ---- the text ----------------------------------------------------------------------------------------------------


def report(findings: Findings) -> str:
    """The findings as aligned lines."""
    rows = [("radiograph", findings.file)]
    for loaded in findings.models:
        repo_id, _, revision = loaded.name.partition("@")
        millions = loaded.model.num_parameters() / 1e6
        what = f"{type(loaded.model).__name__}, {millions:.1f} M parameters, revision {revision}"
        rows.append(("model", f"{repo_id}  {what}"))
    embedding = findings.encoded.embedding
    rows.append(("embedding", f"shape {tuple(embedding.shape)}, L2 norm {embedding.norm():.3f}"))
    rows += _lung_rows(findings.lungs)
    masked, error = findings.reconstructed.mask.float().mean().item(), findings.reconstructed.error
    rows.append(("reconstruction", f"{masked:.1%} of the pixels masked, mean absolute error {error:.3f} (grey 0..1)"))
    rows.append(("picture", f"{findings.output}"))
    rows.append(("time", f"{findings.seconds:.1f} s"))
    return "\n".join([*(f"{name:<16}{value}" for name, value in rows), "", f"{RESEARCH_NOTICE.capitalize()}."])


def _lung_rows(lungs: LungAreas) -> list[tuple[str, str]]:
    if not lungs.total:
        return [("lung area", "none found")]
    rows = [("lung area", f"{lungs.total:6.2%} of the image")]
    sides = (("left", "right", lungs.image_left), ("right", "left", lungs.image_right))
    for side, patient_side, area in sides:
        share = f"{area:6.2%} of the image, {area / lungs.total:5.1%} of the lung area"
        rows.append((f"  image {side}", f"{share} (the patient's {patient_side} in a frontal view)"))
    islands = lungs.total - lungs.image_left - lungs.image_right
    if islands > 1e-4:
        rows.append(("  in islands", f"{islands:6.2%} of the image, {islands / lungs.total:5.1%} of the lung area"))
    return rows
