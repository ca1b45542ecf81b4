"""Tasks: functions from a batch to records (predict, embed, segment, reconstruct, explain).

Each takes a loaded model and a batch and returns a record per image, in order: a dict with `path`, the task's own
findings, `model`, `warnings` and `note`. A record is not a diagnosis: a probability is above or below a
threshold, and the threshold has a name. A task that draws is given `place`, the path of each source's picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from spcxr_hf.data.table import structure_bits
from spcxr_hf.drawing import draw_structures, titled_grid, to_grey, to_picture, with_words
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, write_png
from spcxr_hf.images.reader import read_radiograph
from spcxr_hf.inference.dicom_seg import SourceError, check_highdicom, write_segmentation
from spcxr_hf.inference.explain import draw_explanation, explain, share_inside, target_matrix
from spcxr_hf.inference.pipeline import Batch, Failed, Prepared, Source, prepare
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessorPil
from spcxr_hf.modeling.modeling_spcxr import FEATURE_STATISTICS, SpcxrForImageClassification
from spcxr_hf.models.loading import Loaded, forward, is_multi_label, label_names, probabilities
from spcxr_hf.models.lungs import check_lungs, lungs_of, measure_lungs, segment_lungs, segment_structures
from spcxr_hf.models.typicality import UNLIKE, embed_and_classify
from spcxr_hf.transforms.group_masking import FILL_MODES, GroupMasking, as_pixels

Record = dict[str, Any]
Place = Callable[[Source], Path]
MASK_SUFFIXES = {"png": ".png", "seg": ".dcm"}
NORMAL_LABELS = ("normal", "no finding", "negative", "healthy", "background")
ERROR_TIMES = 4  # errors are small: white is a quarter of the range of grey values
LONGEST_SIDE = 1024  # pixels of a picture over a radiograph
SMALLEST_SIDE = 448  # a smaller radiograph is enlarged


def _record(loaded: Loaded, image: Prepared, **found: Any) -> Record:
    population = (getattr(loaded.model.config, "intended_use", None) or {}).get("population")
    frame = {"model": loaded.name, **({"population": population} if population else {})}
    return {"path": str(image.source.path), **found, **frame, "warnings": image.warnings, "note": RESEARCH_NOTICE}


def _finite_rows(loaded: Loaded, values: torch.Tensor) -> list[list[float]]:
    if not values.isfinite().all():
        raise SpcxrError(f"{loaded.name}: the model's answers are not finite numbers; the checkpoint is damaged")
    return values.tolist()


# ---- predict -----------------------------------------------------------------------------------------------------


class Predictor:
    """Probabilities of a classifier, and decisions by an operating point's thresholds.

    Probabilities are the softmax or, for labels that may hold together, the sigmoid of the logits; calibration is part
    of a checkpoint's head.

    Args:
        loaded: A classifier.
        operating_point: Which of the checkpoint's; by default the one that its configuration names.
        abstain: Leave the answer empty for an image that is unlike the training images.
    """

    def __init__(self, loaded: Loaded, operating_point: str | None = None, abstain: bool = False) -> None:
        config = loaded.model.config
        if config.problem_type == "regression":
            raise SpcxrError(f"{loaded.name}: a regression model gives no probabilities")
        if abstain and loaded.statistics is None:
            raise SpcxrError(f"{loaded.name}: has no {FEATURE_STATISTICS}, so it cannot abstain")
        self.abstain = abstain
        self.labels, self.exclusive = label_names(config), not is_multi_label(config)
        points: Mapping[str, Mapping[str, float]] = getattr(config, "operating_points", None) or {}
        names = list(dict.fromkeys(name for thresholds in points.values() for name in thresholds))
        if operating_point is not None and operating_point not in names:
            raise SpcxrError(f"no operating point {operating_point!r}; the checkpoint has {', '.join(names) or 'none'}")
        chosen: Any = operating_point or getattr(config, "operating_point", None) or next(iter(names), None)
        self.point = chosen
        targets = verdict_first([target for target, values in points.items() if chosen in values], self.labels)
        self.thresholds = {target: points[target][chosen] for target in targets}
        # the labels whose probabilities a target adds up; a label may hold a plus sign itself
        self.members = {one: [one] if one in self.labels else one.split(" + ") for one in self.thresholds}
        for label in (label for labels in self.members.values() for label in labels):
            if label not in self.labels:
                raise SpcxrError(f"an operating point is for {label!r}, but the labels are {', '.join(self.labels)}")

    @torch.inference_mode()
    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `probabilities` by label, and by target the `probability` and its `decision`.

        Of labels that exclude each other, `label` is the most probable, whatever the thresholds. `unlike_training` is
        the share of the validation images that are more like the training images; None where the checkpoint has no
        statistics of them.
        """
        embeddings, logits = embed_and_classify(loaded.model, batch.pixel_values())
        rows = _finite_rows(loaded, probabilities(loaded.model.config, logits).cpu())
        unlike: list[float | None] = [None] * len(rows)
        if loaded.statistics is not None:
            unlike = SpcxrForImageClassification.unlike_training(embeddings, loaded.statistics).tolist()
        records = []
        for image, row, share in zip(batch.images, rows, unlike, strict=True):
            found = self.decide(row)
            if share is not None and share > UNLIKE:
                image.warnings.append("unlike the images that the model was trained on; do not rely on the answer")
                found = _emptied(found) if self.abstain else found
            records.append(_record(loaded, image, **found, unlike_training=share))
        return records

    def decide(self, row: Sequence[float]) -> Record:
        """The findings for one image's probabilities, which are in the order of the labels."""
        by_label = dict(zip(self.labels, row, strict=True))
        targets = {}
        for target, threshold in self.thresholds.items():
            probability = min(1.0, sum(by_label[label] for label in self.members[target]))
            decision = "above" if probability >= threshold else "below"
            targets[target] = {"probability": probability, "decision": decision, "threshold": threshold}
        likeliest = {"label": max(by_label, key=by_label.__getitem__)} if self.exclusive else {}
        return {**likeliest, "probabilities": by_label, "operating_point": self.point, "targets": targets}


def _emptied(found: Record) -> Record:
    """The findings without the answer: the columns stay."""
    label = {"label": None} if "label" in found else {}
    targets = {target: {**one, "probability": None, "decision": None} for target, one in found["targets"].items()}
    return {**found, **label, "probabilities": dict.fromkeys(found["probabilities"]), "targets": targets}


def verdict_first(targets: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The targets, with the one first that tables and the demo show: labels joined (all that are ill), else the first
    label that is not the normal one."""
    joined = [target for target in targets if target not in labels]
    telling = [label for label in labels if label in targets and label.lower() not in NORMAL_LABELS]
    return list(dict.fromkeys([*(joined or telling)[:1], *targets]))


# ---- embed -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(loaded: Loaded, batch: Batch) -> list[Record]:
    """A record per image: `embedding`, the pooled vector, as a list of D numbers."""
    rows = _finite_rows(loaded, forward(loaded.model, batch.pixel_values()).pooler_output.float().cpu())
    return [_record(loaded, image, embedding=row) for image, row in zip(batch.images, rows, strict=True)]


# ---- segment -----------------------------------------------------------------------------------------------------


def mask_suffix(mask_format: str) -> str:
    """The suffix of mask files: "png" (white is lung) or "seg" (DICOM segmentations)."""
    if mask_format not in MASK_SUFFIXES:
        raise SpcxrError(f"no mask format {mask_format!r}; there are {' and '.join(MASK_SUFFIXES)}")
    if mask_format == "seg":
        check_highdicom()
    return MASK_SUFFIXES[mask_format]


def segment(loaded: Loaded, batch: Batch, place: Place, drawings: Path | None = None) -> list[Record | Failed]:
    """A record per image: `mask`, its file, of the image's own size, and `lung_area` as shares of the image.

    Of a model whose labels may overlap also `area`, the share of each label, and `cardiothoracic_ratio` (None where the
    heart or a lung was not found); a PNG mask of it has a bit for each label, the first the lowest.

    A mask whose file ends in .dcm is a DICOM segmentation; an image that none can be made of is a `Failed`. In a
    frontal view the image's left is the patient's right.

    `drawings` is a folder for pictures of the outlines over each radiograph; None: none.
    """
    check_lungs(loaded)
    found: list[Record | Failed] = []
    structures = segment_structures(loaded, batch.pixel_values(), [image.size for image in batch.images])
    for image, masks in zip(batch.images, structures, strict=True):
        path, lungs = place(image.source), lungs_of(masks)
        record: Record = {}
        overlapping = "lung" not in masks
        if overlapping:
            record["area"] = {label: mask.float().mean().item() for label, mask in masks.items()}
            record["cardiothoracic_ratio"] = SpcxrImageProcessorPil.cardiothoracic_ratio(masks)
        shown = masks if overlapping else {"lung": lungs}
        try:
            if path.suffix == MASK_SUFFIXES["seg"]:
                arrays = {label: mask.numpy() for label, mask in shown.items()}
                write_segmentation(arrays, image.source.path, path, loaded.name)
            elif overlapping:
                write_png(Image.fromarray(structure_bits(torch.stack([*masks.values()])).numpy()), path)
            else:
                write_png(Image.fromarray(lungs.numpy().astype(np.uint8) * 255), path)
        except SourceError as error:
            found.append(Failed(image.source, str(error)))
            continue
        if drawings is not None:
            name = image.source.name  # the whole of it: DICOM files are often named 1.2.3.4 and 1.2.3.5
            picture = drawings / (name if name.lower().endswith(".png") else f"{name}.png")
            widths = SpcxrImageProcessorPil.cardiothoracic_widths(masks)
            write_png(draw_structures(_shown(image.source.path), shown, widths), picture)
            record["picture"] = str(picture)
        area = measure_lungs(lungs.numpy())._asdict()
        found.append(_record(loaded, image, mask=str(path), lung_area=area, **record))
    return found


# ---- reconstruct -------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """Grey values (H, W) in 0..1 at the model's size: as read, corrupted, and with the reconstruction where `mask`
    (H, W) is true; and the mean absolute error there."""

    clean: torch.Tensor
    corrupted: torch.Tensor
    composed: torch.Tensor
    mask: torch.Tensor
    error: float


@torch.inference_mode()
def reconstruct(
    loaded: Loaded, clean: torch.Tensor, fill_modes: Sequence[str], seed: int = 0, second: torch.Tensor | None = None
) -> list[Reconstruction]:
    """Corrupt groups of pixels, the same ones at every start, and let the model fill them in.

    Args:
        loaded: A pretrained model with its reconstruction head.
        clean: `pixel_values` (C, H, W).
        fill_modes: What the corrupted groups hold, for each result: "noise", "zeros", "block", "replace".
        seed: Where the groups lie.
        second: `pixel_values` (C, H, W) of the image that "replace" takes its pixels from.
    """
    masked = []
    for fill in fill_modes:
        batch = torch.stack([clean] if fill != "replace" or second is None else [clean, second])
        found = GroupMasking(fill_modes=(fill,))(batch, torch.Generator().manual_seed(seed))
        masked.append((found.pixel_values[0], found.mask[0]))
    images, masks = (torch.stack(parts) for parts in zip(*masked, strict=True))
    clean = clean.unsqueeze(0)
    output = as_pixels(loaded.model.config, forward(loaded.model, images).reconstruction.float().cpu(), clean)
    composed = torch.where(masks, output, clean)
    mean, std = loaded.processor.image_mean[0], loaded.processor.image_std[0]
    grey, corrupted, composed = (to_grey(values, mean, std) for values in (clean, images, composed))
    rows = zip(corrupted, composed, masks[:, 0], strict=True)
    return [Reconstruction(grey[0], row, made, mask, (made - grey[0]).abs()[mask].mean().item())
            for row, made, mask in rows]  # fmt: skip


class Reconstructor:
    """Corrupts each image in several ways and draws the reconstructions, a row for each way.

    `place` says where the picture of each source goes; the others are as of `reconstruct`, and every image has the same
    groups.
    """

    def __init__(
        self,
        place: Place,
        fill_modes: Sequence[str] = FILL_MODES[:3],
        seed: int = 0,
        second: torch.Tensor | None = None,
    ) -> None:
        GroupMasking(fill_modes=tuple(fill_modes))  # refuses an unknown fill
        if "replace" in fill_modes and second is None:
            raise SpcxrError("the fill replace takes its pixels from a second image: give --second FILE")
        self.place, self.fill_modes, self.seed, self.second = place, tuple(dict.fromkeys(fill_modes)), seed, second

    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `picture`, and by fill the `masked` share and the mean absolute `error` in it (0..1)."""
        records = []
        for image in batch.images:
            made = reconstruct(loaded, image.pixel_values, self.fill_modes, self.seed, self.second)
            found = dict(zip(self.fill_modes, made, strict=True))
            rows, titles = [], []
            for fill, one in found.items():
                rows.append([one.clean, one.corrupted, one.composed, ERROR_TIMES * (one.composed - one.clean).abs()])
                titles.append(["clean", f"corrupted: {fill}", "reconstructed", f"error (x {ERROR_TIMES})"])
            path = self.place(image.source)
            write_png(with_words(titled_grid(rows, titles), [f"{RESEARCH_NOTICE.capitalize()}."]), path)
            fills = {fill: {"masked": one.mask.float().mean().item(), "error": one.error}
                     for fill, one in found.items()}  # fmt: skip
            records.append(_record(loaded, image, picture=str(path), seed=self.seed, fills=fills))
        return records


def read_second(loaded: Loaded, path: Path) -> torch.Tensor:
    """`pixel_values` (C, H, W) of the image that "replace" takes its pixels from."""
    seen = prepare(Source(path, path.name), loaded.processor)
    if isinstance(seen, Failed):
        raise SpcxrError(seen.cause)
    return seen.pixel_values


# ---- explain -----------------------------------------------------------------------------------------------------


class Explainer:
    """Draws a relevance map over each radiograph, the lungs outlined.

    Args:
        loaded: A classifier; for the target None any SPCXR model.
        place: Where the picture of each source goes.
        target: A label, or labels joined by " + "; "probable" is each image's most probable label; None the embedding.
        method: "relevance" or "rollout" (`explain.explain`).
        lungs: A segmentation model for the outline and the share of relevance inside the lungs; None leaves both out.
    """

    def __init__(
        self,
        loaded: Loaded,
        place: Place,
        target: str | None = "probable",
        method: str = "relevance",
        lungs: Loaded | None = None,
    ) -> None:
        self.place, self.target, self.method, self.lungs = place, target, method, lungs
        if target not in (None, "probable"):
            target_matrix(loaded.model, target, 1)  # refuses an unknown label

    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `picture`, `target`, `method`, and `relevance_in_lungs` beside `lung_area` (0 .. 1)."""
        pixel_values = batch.pixel_values()
        targets: list[str] | None = None if self.target is None else [self.target] * len(batch.images)
        if self.target == "probable":
            names = label_names(loaded.model.config)
            with torch.inference_mode():
                best = forward(loaded.model, pixel_values).logits.argmax(dim=-1).tolist()
            targets = [names[index] for index in best]
        maps = explain(loaded.model, pixel_values, targets, self.method).cpu()
        records = []
        for image, target, relevance in zip(batch.images, targets or ["embedding"] * len(maps), maps, strict=True):
            found: Record = {"target": target, "method": self.method}
            mask = None
            if self.lungs is not None:
                seen = prepare(image.source, self.lungs.processor)
                if isinstance(seen, Failed):
                    raise SpcxrError(seen.cause)
                mask = segment_lungs(self.lungs, seen.pixel_values.unsqueeze(0), [seen.size])[0]
                share = share_inside(relevance, mask)
                found["relevance_in_lungs"] = share if share == share else None
                found["lung_area"] = mask.float().mean().item()
            path = self.place(image.source)
            write_png(
                with_words(_over_radiograph(image.source.path, relevance, mask), map_caption(found, relevance)), path
            )
            records.append(_record(loaded, image, picture=str(path), **found))
        return records


def _shown(path: Path) -> torch.Tensor:
    """A radiograph (H, W) in 0 .. 1, no side longer than `LONGEST_SIDE` and the longer one at least `SMALLEST_SIDE`."""
    radiograph = read_radiograph(path, strict=None)
    longer = max(radiograph.size)
    scale = min(1.0, LONGEST_SIDE / longer) if longer >= SMALLEST_SIDE else SMALLEST_SIDE / longer
    size = (max(1, round(radiograph.width * scale)), max(1, round(radiograph.height * scale)))
    return torch.from_numpy(np.asarray(radiograph.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255)


def _over_radiograph(path: Path, relevance: torch.Tensor, mask: torch.Tensor | None) -> Image.Image:
    """The map over the radiograph."""
    return to_picture(draw_explanation(_shown(path), relevance, mask))


def map_caption(found: Record, relevance: torch.Tensor) -> list[str]:
    """The words under a map, its scale among them."""
    target = "the embedding" if found["target"] == "embedding" else found["target"]
    said = f"{found['method'].capitalize()} for {target}"
    if found.get("relevance_in_lungs") is not None:
        area = f"lungs: {found['lung_area']:.0%} of the image"
        said += f"; {found['relevance_in_lungs']:.0%} of it inside the lungs ({area})"
    scale = f"Colour: from the average patch to {(relevance.max() / relevance.mean()).item():.1f} times it, yellow."
    meaning = "What the model used, not where a disease is."
    return [f"{said}.", *([scale] if relevance.any() else []), meaning, f"{RESEARCH_NOTICE.capitalize()}."]
