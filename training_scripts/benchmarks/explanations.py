"""Faithfulness of a classifier's saliency maps: deletion and insertion curves against random maps, and the lungs'
share.

    python -m training_scripts.benchmarks.explanations --model model_cards/pneumonia \
        --lungs model_cards/lung-segmentation \
        --data ../shared/data --output training_scripts/benchmarks/results/explain.json
    python -m training_scripts.benchmarks.explanations --render training_scripts/GUIDES.md

Deletion and insertion are those of RISE (arXiv 1806.07421, section 4.1), by patches. Two controls: random maps, several
for each image, and the relevance map of another image, of the same model but not of this image. Differences
are paired by image, positive where the map is better, with 95 % intervals by patient. `--pictures FOLDER` draws the
curves, and the first maps over their radiographs: keep those where the images may be.

Each model has its own entry in the results file. Columns and classes that are left out are those of the recipe in
the model's folder. `--render` measures nothing and writes the tables of the results between `<!-- explain -->` and
`<!-- /explain -->`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.drawing import to_grey
from spcxr_hf.evaluation.bootstrap import bootstrap_interval, patient_groups
from spcxr_hf.evaluation.plots import draw_contact_sheet, save_figure
from spcxr_hf.evaluation.predict import (
    LabelledRows,
    load_classifier,
    match_classes,
    open_images,
    select_rows,
)
from spcxr_hf.files import read_json, software_versions, write_json
from spcxr_hf.inference.explain import (
    METHODS,
    draw_explanation,
    explain,
    share_inside,
)
from spcxr_hf.models.loading import is_multi_label, label_names, to_pixel_values
from spcxr_hf.models.lungs import Segmenter, load_segmenter, segment_lungs
from spcxr_hf.training.arguments import fill_from_recipe, parse_arguments, run_script
from training_scripts.benchmarks.lib.faithfulness import PerturbationCurves, deletion_insertion, draw_perturbation
from training_scripts.benchmarks.lib.timing import replace_block

RESULTS = Path(__file__).resolve().parent / "results" / "explain.json"
SHOWN = 8  # images in the picture of the maps
AGAINST = {"random": "random maps", "relevance of another image": "another image's relevance"}  # in the tables


@dataclass
class Arguments:
    """Measure the faithfulness of saliency maps."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of an SPCXR classifier"})
    data: str | None = field(default=None, metadata={"help": "a set with a column of labels and a column of splits"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels; by default that of the model's recipe, or `label`"}
    )
    split_column: str | None = field(
        default=None, metadata={"help": "column of the splits; by default that of the model's recipe, or `split`"}
    )
    split: str = field(default="test", metadata={"help": "its value to take images from"})
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "the model's classes, as `normal pneumonia=bacterial+viral`; by default the recipe's"},
    )
    target: str = field(
        default="probable",
        metadata={"help": "a label, or labels joined by ' + '; 'probable' is each image's most probable label"},
    )
    lungs: str | None = field(default=None, metadata={"help": "a segmentation model, for the share inside the lungs"})
    images: int = field(default=50, metadata={"help": "how many, drawn at random"})
    random_maps: int = field(default=2, metadata={"help": "random maps for each image; their areas are averaged"})
    steps: int = field(default=7, metadata={"help": "steps of the curves"})
    batch_size: int = field(default=16, metadata={"help": "images at a time"})
    output: str | None = field(default=None, metadata={"help": "JSON file; entries of other models in it are kept"})
    pictures: str | None = field(default=None, metadata={"help": "folder for curves.png and maps.png"})
    resamples: int = field(default=2000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the choice of images, the random maps and the bootstrap"})
    render: str | None = field(default=None, metadata={"help": "measure nothing; rewrite the tables in this page"})


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    if arguments.render:
        results = read_json(Path(arguments.output or RESULTS))
        replace_block(Path(arguments.render), "explain", tables_of(results))
        return results
    check(arguments)
    result = measure_model(arguments)
    if arguments.output:
        path = Path(arguments.output)
        write_json(path, {**read_json(path), name_of(arguments): result})
    print(json.dumps(result["against"], indent=2))
    return result


def measure_model(arguments: Arguments) -> dict:
    """Maps and curves of one model."""
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    model, processor = load_classifier(str(arguments.model), device)
    segmenter = load_segmenter(arguments.lungs, device) if arguments.lungs else None
    rows = select(arguments, model)
    pixels, masks = prepare(rows, processor, segmenter)
    targets = targets_of(arguments, model, pixels)
    maps = draw_maps(arguments, model, pixels, targets)
    curves = {name: measure(arguments, model, pixels, one, targets) for name, one in maps.items()}
    areas = {name: (one.deletion_auc.numpy(), one.insertion_auc.numpy()) for name, one in joined(curves).items()}
    result = describe(arguments, rows, areas, {name: maps[name] for name in METHODS}, masks)
    if arguments.pictures:
        draw(arguments, processor, pixels, joined(curves), maps, masks)
    return result


def name_of(arguments: Arguments) -> str:
    """The model's entry in the results."""
    return Path(str(arguments.model)).resolve().name


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late; fill in what the model's recipe says."""
    if arguments.model is None or arguments.data is None:
        raise SpcxrError("give --model and --data to measure, or --render PAGE")
    fill_from_recipe(
        arguments, Path(arguments.model) / "recipe.yaml", label_column="label", split_column="split", classes=[]
    )
    for name, least in (("images", 2), ("random_maps", 1), ("steps", 1), ("batch_size", 1), ("resamples", 1)):
        if getattr(arguments, name) < least:
            raise SpcxrError(f"{name} must be at least {least}; got {getattr(arguments, name)}")


def select(arguments: Arguments, model: Any) -> LabelledRows:
    """The images to look at."""
    classes = match_classes(str(arguments.model), label_names(model.config), parse_classes(arguments.classes))
    rows = select_rows(
        read_set(str(arguments.data)),
        str(arguments.label_column),
        str(arguments.split_column),
        arguments.split,
        classes,
        is_multi_label(model.config),
    )
    kept = np.zeros(len(rows), dtype=bool)
    kept[np.random.default_rng(arguments.seed).permutation(len(rows))[: arguments.images]] = True
    return rows.where(kept)


def prepare(rows: LabelledRows, processor: Any, segmenter: Segmenter | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pixel values (n, C, H, W), and the lungs of each image at the segmentation model's size; none without it."""
    pixels, masks = [], []
    for image in tqdm(open_images(rows.table), total=len(rows), desc="reading", unit="image"):
        pixels.append(processor(image, return_tensors="pt").pixel_values)
        if segmenter is not None:
            values = to_pixel_values(segmenter.loaded.processor, [image])
            masks += segment_lungs(segmenter.loaded, values, [(values.shape[-2], values.shape[-1])])
    return torch.cat(pixels), masks


@torch.no_grad()
def targets_of(arguments: Arguments, model: Any, pixels: torch.Tensor) -> list[str]:
    """The target of each image."""
    if arguments.target != "probable":
        return [arguments.target] * len(pixels)
    names = label_names(model.config)
    parts = pixels.split(arguments.batch_size)
    return [names[best] for part in parts for best in model(part.to(model.device)).logits.argmax(dim=1).tolist()]


def draw_maps(arguments: Arguments, model: Any, pixels: torch.Tensor, targets: list[str]) -> dict[str, torch.Tensor]:
    """Maps (n, rows, columns) by name, the controls among them."""
    maps: dict[str, torch.Tensor] = {}
    for method in METHODS:
        starts = tqdm(range(0, len(pixels), arguments.batch_size), desc=method, unit="batch")
        parts = [slice(start, start + arguments.batch_size) for start in starts]
        maps[method] = torch.cat([explain(model, pixels[part], targets[part], method).cpu() for part in parts])
    maps["relevance of another image"] = maps["relevance"].roll(1, dims=0)
    generator = torch.Generator().manual_seed(arguments.seed)
    for number in range(arguments.random_maps):
        maps[f"random {number}"] = torch.rand(maps["relevance"].shape, generator=generator)
    return maps


def measure(
    arguments: Arguments, model: Any, pixels: torch.Tensor, maps: torch.Tensor, targets: list[str]
) -> PerturbationCurves:
    """The curves of one kind of map over all images."""
    found = []
    for start in tqdm(range(0, len(pixels), arguments.batch_size), desc="curves", unit="batch"):
        part = slice(start, start + arguments.batch_size)
        found.append(deletion_insertion(model, pixels[part], maps[part], targets[part], arguments.steps))
    deletion, insertion = (torch.cat([getattr(one, name) for one in found]) for name in ("deletion", "insertion"))
    return PerturbationCurves(found[0].fractions, deletion, insertion)


def joined(curves: dict[str, PerturbationCurves]) -> dict[str, PerturbationCurves]:
    """The same with the random maps of an image as one, their mean."""
    random = [one for name, one in curves.items() if name.startswith("random ")]
    deletion, insertion = (torch.stack([getattr(one, name) for one in random]).mean(dim=0)
                           for name in ("deletion", "insertion"))  # fmt: skip
    kept = {name: one for name, one in curves.items() if not name.startswith("random ")}
    return kept | {"random": PerturbationCurves(random[0].fractions, deletion, insertion)}


# ---- the result ----------------------------------------------------------------------------------------------------


def describe(
    arguments: Arguments,
    rows: LabelledRows,
    areas: dict[str, tuple[np.ndarray, np.ndarray]],
    maps: dict[str, torch.Tensor],
    masks: list[torch.Tensor],
) -> dict:
    """Areas under the curves, paired differences, and the share inside the lungs, each with its 95 % interval."""
    groups = patient_groups(rows.patients, len(rows))

    def mean(values: np.ndarray) -> dict:
        values = values.astype(float)
        kept = [None if groups is None else groups[row] for row in np.flatnonzero(~np.isnan(values))]
        values = values[~np.isnan(values)]
        interval = bootstrap_interval(
            values, None if groups is None else kept, resamples=arguments.resamples, seed=arguments.seed
        )
        return {"mean": float(values.mean()), "ci95": list(interval), "images": len(values)}

    result: dict[str, Any] = {
        "model": name_of(arguments),
        "weights_sha256": weights_sum(arguments),
        "split": arguments.split,
        "target": arguments.target,
        "images": len(rows),
        "patients": None if groups is None else len(set(groups)),
        "steps": arguments.steps,
        "random_maps": arguments.random_maps,
        "software": software_versions(),
        "deletion_auc": {name: mean(pair[0]) for name, pair in areas.items()},
        "insertion_auc": {name: mean(pair[1]) for name, pair in areas.items()},
        "against": {},
    }
    for method in METHODS:
        for control in ("random", "relevance of another image"):
            # Positive is better in both: the answer falls faster, and rises faster.
            result["against"][f"{method} against {control}"] = {
                "deletion": mean(areas[control][0] - areas[method][0]),
                "insertion": mean(areas[method][1] - areas[control][1]),
            }
    if masks:
        shares = {name: np.array([share_inside(one, mask) for one, mask in zip(found, masks, strict=True)])
                  for name, found in maps.items()}  # fmt: skip
        result["lungs"] = {"area": mean(np.array([mask.float().mean().item() for mask in masks]))}
        result["lungs"] |= {f"share of {name}": mean(found) for name, found in shares.items()}
    return result


def weights_sum(arguments: Arguments) -> str | None:
    """The checksum of the weights, where they lie in a folder."""
    file = Path(str(arguments.model)) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def tables_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: how much better the maps are than the controls, and where they lie."""
    if not results:
        return "Not measured."
    lines = [
        "| checkpoint | map | against | deletion, better by | insertion, better by | found |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        images = f"{result['images']} of `{result['split']}`"
        for pair, areas in result["against"].items():
            method, control = pair.split(" against ")
            cells = [f"`{name}` ({images})", method, AGAINST[control], *map(_difference, areas.values()), _found(areas)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| checkpoint | share of the image that is lung | share of relevance in it | of rollout |"]
    lines += ["|---|---|---|---|"]
    for name, result in results.items():
        if lungs := result.get("lungs"):
            shares = [_share(lungs[key]) for key in ("area", "share of relevance", "share of rollout")]
            lines.append(f"| `{name}` | {' | '.join(shares)} |")
    return "\n".join(lines)


def _difference(figure: Mapping[str, Any]) -> str:
    low, high = figure["ci95"]
    return f"{figure['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _share(figure: Mapping[str, Any]) -> str:
    low, high = figure["ci95"]
    return f"{figure['mean']:.2f} [{low:.2f}, {high:.2f}]"


def _found(areas: Mapping[str, Mapping[str, Any]]) -> str:
    """In words: an interval that holds 0 shows no difference."""
    signs = {name: (figure["ci95"][0] > 0) - (figure["ci95"][1] < 0) for name, figure in areas.items()}
    if set(signs.values()) in ({1}, {0}, {-1}):
        return {1: "better in both", 0: "no difference", -1: "worse in both"}[next(iter(signs.values()))]
    words = {1: "better in", 0: "no difference in", -1: "worse in"}
    return ", ".join(f"{words[sign]} {name}" for name, sign in signs.items())


def draw(
    arguments: Arguments,
    processor: Any,
    pixels: torch.Tensor,
    curves: dict[str, PerturbationCurves],
    maps: dict[str, torch.Tensor],
    masks: list[torch.Tensor],
) -> None:
    """The mean curves, and the first maps over their radiographs."""
    folder = Path(arguments.pictures or ".")
    means = {
        name: (one.deletion.mean(dim=0).numpy(), one.insertion.mean(dim=0).numpy()) for name, one in curves.items()
    }
    save_figure(draw_perturbation(means, curves["random"].fractions.numpy()), folder / "curves.png")
    grey = to_grey(pixels[:SHOWN], processor.image_mean[0], processor.image_std[0])
    tiles = []
    for number, picture in enumerate(grey):
        large = torch.nn.functional.interpolate(picture[None, None], scale_factor=3, mode="bicubic")[0, 0].clamp(0, 1)
        mask = masks[number] if masks else None
        for method in METHODS:
            share = "" if mask is None else f"\n{share_inside(maps[method][number], mask):.0%} inside the lungs"
            tiles.append((draw_explanation(large, maps[method][number], mask).numpy(), f"{method}{share}"))
    save_figure(draw_contact_sheet(tiles, title="For research use only, not for clinical use."), folder / "maps.png")


if __name__ == "__main__":
    run_script(main)
