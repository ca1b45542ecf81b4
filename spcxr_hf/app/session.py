"""What the browser demo computes: files to pages, a page and a choice to an answer. Nothing here knows of a browser.

list_choices -> Desk.take      files -> pages, each read once, its file removed
             -> Desk.answer    a page and what was chosen -> pictures and numbers, nothing of it on the disk
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from spcxr_hf.drawing import overlay
from spcxr_hf.errors import SpcxrError
from spcxr_hf.hub.folder import checkpoint_folders, given_or_bundled
from spcxr_hf.images.reader import read_radiograph, read_with_quality_warnings
from spcxr_hf.inference.demo import example_radiograph
from spcxr_hf.inference.explain import METHODS, draw_explanation, explain, share_inside
from spcxr_hf.inference.neighbors import Neighbour, NeighbourIndex
from spcxr_hf.inference.pipeline import Batch, Loaded, Prepared, Source, load_model
from spcxr_hf.inference.tasks import Predictor, segment_lungs
from spcxr_hf.models.auto import register
from spcxr_hf.models.lungs import LungAreas, measure_lungs

LONGEST_SIDE = 768  # pixels of the pictures that are shown
MOST_FILES = 8  # in one go
MOST_BYTES = 64 * 2**20  # of one file
MOST_PIXELS = 120_000_000  # of all pages that a session holds: 240 MB
MOST_MAPS = 3
THUMBNAIL = 320  # pixels of a neighbour's longer side
NEIGHBOURS = 5
TASKS = {  # a checkpoint's own class -> the task that it is offered for
    "SpcxrModel": "embedding",
    "SpcxrForPreTraining": "embedding",
    "SpcxrForSemanticSegmentation": "segmentation",
    "SpcxrForImageClassification": "classification",
}
TITLES = {"embedding": "embedding", "segmentation": "lungs"}
MADE_SIDE = 512


# ---- what there is to choose -------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A task as people see it, what `inference.load_model` calls it, and the checkpoint: an id or a folder."""

    title: str
    task: str
    model: str


def list_choices(checkpoints: Path | None = None, models: Sequence[str] = ()) -> list[Choice]:
    """A choice for each checkpoint: the embedding, the lungs, then the classifiers by name.

    Args:
        checkpoints: A folder that holds a folder per checkpoint; by default the source tree's own.
        models: Hub ids instead. What cannot be found is left out.

    Raises:
        SpcxrError: there are none, or a folder's `config.json` cannot be read.
    """
    places = list(models) or [str(path) for path in checkpoint_folders(given_or_bundled(checkpoints))]
    found: dict[str, Choice] = {}
    for place in places:
        task = _task_of(place, is_id=bool(models))
        if task is None:
            continue
        name = Path(place).name
        title = TITLES.get(task, name)
        found.setdefault(title if title not in found else f"{title} ({name})", Choice(title, task, place))
    choices = [choice._replace(title=title) for title, choice in found.items()]
    if not choices:
        raise SpcxrError(f"no checkpoint that the demo can show among {', '.join(places)}")
    order = ["embedding", "segmentation", "classification"]
    return sorted(choices, key=lambda choice: order.index(choice.task))


def _task_of(place: str, is_id: bool) -> str | None:
    """The task by the class that `config.json` names; None for what is no SPCXR checkpoint."""
    try:
        if is_id:
            register()
            names = AutoConfig.from_pretrained(place).architectures
        else:
            names = json.loads((Path(place) / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        if is_id or isinstance(error, FileNotFoundError):
            return None
        raise SpcxrError(f"{place}: config.json cannot be read ({type(error).__name__})") from error
    return TASKS.get((names or [""])[0])


def load_index(place: Path) -> NeighbourIndex:
    """The index in a file, or in the only safetensors file of a folder.

    Raises:
        SpcxrError: there is none, there are several, or it cannot be used.
    """
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1:
        raise SpcxrError(f"{place}: {len(files)} safetensors files in this folder; one index of neighbours is needed")
    return NeighbourIndex.load(files[0])


# ---- pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Page:
    """A file as read.

    Attributes:
        name: The file's own name, without folders.
        image: At full depth, mode `L` or `I;16`; None where the file cannot be used.
        shown: Mode `L`, at most 768 pixels a side.
        quality_warnings: Reasons to doubt that it is an upright frontal chest radiograph.
        cause: Why it cannot be used.
    """

    name: str
    image: Image.Image | None = None
    shown: Image.Image | None = None
    quality_warnings: list[str] = field(default_factory=list)
    cause: str | None = None


def read_page(path: Path) -> Page:
    """Read one file; what is wrong with it stands in the page, and the path does not."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SpcxrError(f"{path}: larger than {MOST_BYTES // 2**20} MB")
        image, found = read_with_quality_warnings(path, full_depth=True)
        return Page(path.name, image, shrink(image), found)
    except SpcxrError as error:
        cause = str(error).replace(f"{path}: ", "")
    except FileNotFoundError:
        cause = "the file is gone; drop it again"
    except Exception as error:  # whatever a damaged file does to a library, the demo goes on
        cause = f"cannot be used ({type(error).__name__})"
    return Page(path.name, cause=cause)


def shrink(image: Image.Image) -> Image.Image:
    """Mode `L` with at most 768 pixels a side; of more than 8 bits the upper ones."""
    if image.mode != "L":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    small = image.copy() if max(image.size) <= LONGEST_SIDE else image
    scale = min(1.0, LONGEST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return small.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def made_radiograph() -> Page:
    """A drawing, nobody's radiograph: two dark lungs in a bright body, with spine, heart and ribs."""
    y, x = np.mgrid[0:MADE_SIDE, 0:MADE_SIDE] / MADE_SIDE - 0.5

    def blob(cx: float, cy: float, rx: float, ry: float, power: float = 2.0) -> np.ndarray:
        distance = np.abs((x - cx) / rx) ** power + np.abs((y - cy) / ry) ** power
        return 1 / (1 + np.exp(((distance - 1) * 12).clip(max=50)))  # 1 inside, with a soft edge

    body = np.maximum(blob(0, 0.25, 0.46, 0.62, 4), blob(0, -0.42, 0.11, 0.3))
    lungs = np.maximum(blob(-0.2, -0.02, 0.15, 0.34, 2.4), blob(0.2, -0.02, 0.15, 0.34, 2.4))
    ribs = 0.5 + 0.5 * np.cos((y + 0.9 * x**2) * 2 * np.pi * 11)
    grey = 0.66 * body - lungs * (0.46 - 0.07 * ribs)
    grey += 0.2 * blob(0, 0, 0.035, 0.6) * body + 0.3 * blob(0.07, 0.12, 0.13, 0.17) * lungs
    grey += np.random.default_rng(0).normal(0, 0.012, grey.shape)
    image = Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))
    return Page("made-radiograph.png", image, image)


def example_page() -> Page:
    """The radiograph that pydicom-data has installed; a page with its cause where it is missing."""
    try:
        return read_page(example_radiograph())
    except SpcxrError as error:
        return Page("example", cause=str(error))


# ---- answers -----------------------------------------------------------------------------------------------------


class Map(NamedTuple):
    """Where an answer comes from: its target (None: the embedding), the picture, and the share inside the lungs."""

    target: str | None
    picture: Image.Image
    share: float | None


@dataclass(frozen=True)
class Answer:
    """All that is shown of a page. What a task has none of is None or empty.

    Attributes:
        model: What the checkpoint is called.
        prediction: As `tasks.Predictor` gives it: `probabilities`, `operating_point`, `targets`.
        embedding: (D) float32.
        lungs: The picture with the lungs tinted, and their areas as shares of the image.
        maps: Relevance, for the most probable label first, then for the targets with an operating point.
        neighbours: The nearest images of the index, each with its picture where its id is a file that can be read;
            None without an index.
    """

    page: Page
    choice: Choice
    model: str
    prediction: dict[str, Any] | None = None
    embedding: torch.Tensor | None = None
    lungs: tuple[Image.Image, LungAreas] | None = None
    maps: list[Map] = field(default_factory=list)
    neighbours: list[tuple[Neighbour, Image.Image | None]] | None = None


class Desk:
    """Takes files and answers; one for all sessions, which share models and nothing else.

    Args:
        choices: From `list_choices`.
        index: Where neighbours are looked for.
        device: As of `inference.load_model`.
    """

    def __init__(self, choices: Sequence[Choice], index: NeighbourIndex | None = None, device: str = "auto") -> None:
        self.choices = {choice.title: choice for choice in choices}
        self.index, self.device = index, device
        self._models: dict[Choice, Loaded] = {}
        self._pages: WeakValueDictionary[Path, Page] = WeakValueDictionary()
        # One forward pass at a time: a second would only take the cores from the first.
        self._lock = threading.Lock()

    def take(self, paths: Sequence[Path]) -> list[Page]:
        """Read uploaded files and remove every one of them.

        An upload's folder is named by a hash of its content. So where two people drop the same file at the same
        moment, the one's page serves the other, whose file is gone then.
        """
        pages: list[Page] = []
        try:
            for path in paths[:MOST_FILES]:
                page = self._pages.get(path) if not path.exists() else None
                page = page or _within(read_page(path), pages)
                self._pages[path] = page
                pages.append(page)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        return pages

    def answer(self, page: Page, title: str) -> Answer:
        """What the chosen checkpoint makes of a page.

        Raises:
            SpcxrError: there is no such choice, the page could not be read, or the checkpoint cannot be used.
        """
        if page.image is None or page.shown is None:
            raise SpcxrError(f"{page.name}: {page.cause}")
        if title not in self.choices:
            raise SpcxrError(f"no task {title!r}; there are {', '.join(self.choices)}")
        with self._lock:
            return self._answer(page, self.choices[title])

    def _answer(self, page: Page, choice: Choice) -> Answer:
        loaded = self._load(choice)
        name = Path(choice.model).name if Path(choice.model).is_dir() else loaded.name
        mask = self._lungs_of(page)
        found: dict[str, Any] = {"lungs": None if mask is None else _draw_lungs(page, mask)}
        if choice.task == "segmentation":
            return Answer(page, choice, name, **found)
        batch = self._batch(page, loaded)
        targets: list[str | None] = [None]
        if choice.task == "classification":
            found["prediction"] = Predictor(loaded)(loaded, batch)[0]
            targets = _targets(found["prediction"])
        maps = [_draw_map(page, loaded, batch, target, mask) for target in targets]
        embedding = self._embedding(page)
        if choice.task == "embedding":
            found["embedding"] = embedding
        return Answer(page, choice, name, maps=maps, neighbours=self._neighbours(embedding), **found)

    def _load(self, choice: Choice) -> Loaded:
        if choice not in self._models:
            self._models[choice] = load_model(choice.task, choice.model, self.device)
        return self._models[choice]

    def _first(self, task: str) -> Choice | None:
        return next((choice for choice in self.choices.values() if choice.task == task), None)

    def _batch(self, page: Page, loaded: Loaded) -> Batch:
        """The page as it was read; its size is that of the pictures, so that masks are made at that size."""
        pixel_values = loaded.processor(page.image, return_tensors="pt").pixel_values[0]
        size = (page.shown.height, page.shown.width)  # type: ignore[union-attr]
        return Batch([Prepared(Source(Path(page.name), page.name), pixel_values, size, page.quality_warnings)], [])

    def _lungs_of(self, page: Page) -> np.ndarray | None:
        choice = self._first("segmentation")
        if choice is None:
            return None
        loaded = self._load(choice)
        return segment_lungs(loaded, self._batch(page, loaded))[0]

    @torch.inference_mode()
    def _embedding(self, page: Page) -> torch.Tensor | None:
        choice = self._first("embedding")
        if choice is None:
            return None
        loaded = self._load(choice)
        pixel_values = self._batch(page, loaded).pixel_values(loaded.device)
        return loaded.model(pixel_values).pooler_output[0].float().cpu()

    def _neighbours(self, embedding: torch.Tensor | None) -> list[tuple[Neighbour, Image.Image | None]] | None:
        if self.index is None or embedding is None:
            return None
        return [(one, neighbor_picture(one.id)) for one in self.index.search(embedding.unsqueeze(0), NEIGHBOURS)[0]]


def neighbor_picture(name: str) -> Image.Image | None:
    """The picture behind an id of the index; None where it is no file, or none that can be read."""
    try:
        image = read_radiograph(name, strict=None) if Path(name).is_file() else None
    except (SpcxrError, OSError, ValueError):
        return None
    if image is not None:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _within(page: Page, pages: Sequence[Page]) -> Page:
    """The page, unless it is too much with the others."""
    pixels = sum(one.image.width * one.image.height for one in [*pages, page] if one.image is not None)
    if pixels <= MOST_PIXELS:
        return page
    return Page(page.name, cause=f"too much at once: more than {MOST_PIXELS // 10**6} million pixels in all")


def _targets(prediction: dict[str, Any]) -> list[str | None]:
    """The most probable label, then the targets that have an operating point."""
    by_label = prediction["probabilities"]
    labels: list[str] = [max(by_label, key=by_label.get), *prediction["targets"]]
    return list(dict.fromkeys(labels))[:MOST_MAPS]  # type: ignore[return-value]


def _draw_map(page: Page, loaded: Loaded, batch: Batch, target: str | None, mask: np.ndarray | None) -> Map:
    relevance = explain(loaded.model, batch.pixel_values(loaded.device), target, METHODS[0])[0].cpu()
    lungs = None if mask is None else torch.from_numpy(mask)
    share = None if lungs is None else share_inside(relevance, lungs)
    picture = _to_image(draw_explanation(_grey(page), relevance, lungs))
    return Map(target, picture, share if share == share else None)


def _draw_lungs(page: Page, mask: np.ndarray) -> tuple[Image.Image, LungAreas]:
    return _to_image(overlay(_grey(page), torch.from_numpy(mask))), measure_lungs(mask)


def _grey(page: Page) -> torch.Tensor:
    return torch.from_numpy(np.asarray(page.shown, dtype=np.float32) / 255)


def _to_image(colour: torch.Tensor) -> Image.Image:
    return Image.fromarray((colour.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
