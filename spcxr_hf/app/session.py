"""The computations of the browser demo, without the interface.

list_choices -> Session.read      uploaded files -> radiographs, each read once, its file removed
             -> Session.answer    a radiograph and a choice -> numbers and pictures, kept in memory alone
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from spcxr_hf.drawing import draw_structures, overlay, to_picture
from spcxr_hf.errors import SpcxrError
from spcxr_hf.hub.folder import checkpoint_folders, given_or_bundled
from spcxr_hf.images.reader import read_radiograph, read_with_quality_warnings, to_8_bit
from spcxr_hf.inference.demo import example_radiograph
from spcxr_hf.inference.explain import METHODS, draw_explanation, explain, share_inside
from spcxr_hf.inference.intended_use import UNSTATED, AgeAndView, read_age_and_view, use_warnings
from spcxr_hf.inference.neighbors import Neighbor, NeighborIndex
from spcxr_hf.inference.pipeline import Batch, Prepared, Source, load_model
from spcxr_hf.inference.tasks import Predictor
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessorPil
from spcxr_hf.models.loading import Loaded, forward, load_config
from spcxr_hf.models.lungs import LungAreas, check_lungs, lungs_of, measure_lungs, segment_structures

LONGEST_SIDE = 768  # pixels of the pictures that are shown
MAX_FILES = 8  # at once
MAX_BYTES = 64 * 2**20  # of one file
MAX_PIXELS = 120_000_000  # of all radiographs of a visitor: 240 MB
THUMBNAIL = 320  # pixels of a neighbor's longer side
NEIGHBORS = 5
TASKS = {  # a checkpoint's own class -> the task that it is offered for
    "SpcxrModel": "embedding",
    "SpcxrForPreTraining": "embedding",
    "SpcxrForSemanticSegmentation": "segmentation",
    "SpcxrForImageClassification": "classification",
}
TITLES = {  # the bundled checkpoints; another one is shown by its name
    "lung-segmentation": "Where are the lungs?",
    "anatomy": "How wide is the heart?",
    "covid": "COVID-19 or another pneumonia?",
    "pneumonia": "Pneumonia: bacterial or viral?",
    "screening": "Is anything abnormal?",
    "base": "Embedding: which radiographs are alike?",
}
NOT_OFFERED = ("covid",)  # the worked example of a shortcut: wrong on films of other hospitals
ORDER = ("segmentation", "classification", "embedding")
MADE_SIDE = 512
EXAMPLE_HIDES = "round masses, a finding that these classifiers were not trained for: they call it normal"


# ---- what there is to choose -------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A checkpoint as the page offers it.

    Attributes:
        name: The folder's name or the Hub id.
        task: "embedding", "segmentation" or "classification".
        model: The folder or the Hub id.
        intended_use: Of the configuration: population, ages and views.
        card, card_url: The text of the folder's model card, or the address of an id's; "" for the other.
    """

    name: str
    task: str
    model: str
    intended_use: Mapping[str, Any] = MappingProxyType({})
    card: str = ""
    card_url: str = ""

    @property
    def population(self) -> str:
        """Population the model is intended for; "" where the configuration does not name one."""
        return str(self.intended_use.get("population", ""))

    @property
    def title(self) -> str:
        """Display name of the task."""
        return TITLES.get(self.name.rpartition("/")[2], self.name)


def list_choices(checkpoints: Path | None = None, models: Sequence[str] = ()) -> list[Choice]:
    """A choice for each checkpoint: segmentation, classifiers, embedding, in the order of `TITLES`, others by name.

    Args:
        checkpoints: A folder that holds a folder per checkpoint; by default the source tree's, without `NOT_OFFERED`.
        models: Hub ids instead. Those that cannot be found are left out.
    """
    choices = []
    if models:
        for model in models:
            try:
                config = load_config(model)
            except SpcxrError:
                continue
            if task := TASKS.get((config.architectures or [""])[0]):
                use = getattr(config, "intended_use", None) or {}
                choices.append(Choice(model, task, model, use, card_url=f"https://huggingface.co/{model}"))
    else:
        for folder in checkpoint_folders(given_or_bundled(checkpoints)):
            if checkpoints is None and folder.name in NOT_OFFERED:
                continue
            try:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                task = TASKS.get((config.get("architectures") or [""])[0])
                card = (folder / "README.md").read_text("utf-8") if (folder / "README.md").is_file() else ""
            except FileNotFoundError:
                continue
            except (OSError, ValueError, AttributeError) as error:
                raise SpcxrError(f"{folder}: config.json cannot be read ({type(error).__name__})") from error
            if task:
                text = card.split("\n---\n", 1)[1].strip() if card.startswith("---\n") and "\n---\n" in card else card
                choices.append(Choice(folder.name, task, str(folder), config.get("intended_use") or {}, text))
    if not choices:
        places = list(models) or [str(given_or_bundled(checkpoints))]
        raise SpcxrError(f"no checkpoint that the demo can show among {', '.join(places)}")
    titles = list(TITLES)

    def place(choice: Choice) -> tuple[int, int, str]:
        name = choice.name.rpartition("/")[2]
        return ORDER.index(choice.task), titles.index(name) if name in titles else len(titles), choice.name

    return sorted(choices, key=place)


def load_index(place: Path) -> NeighborIndex:
    """The index in a file, or in the only safetensors file of a folder."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1:
        raise SpcxrError(f"{place}: {len(files)} safetensors files in this folder; one index of neighbors is needed")
    return NeighborIndex.load(files[0])


# ---- radiographs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Radiograph:
    """A file as read.

    Attributes:
        name: The file's own name, without folders.
        image: At full depth, mode `L` or `I;16`; None where the file cannot be used.
        quality_warnings: Reasons why it may not be an upright frontal chest radiograph.
        header: Age and view, where a DICOM's header says them.
        hides: A finding in it that the classifiers cannot see; "" where none is known.
        cause: Why it cannot be used.
        shown: Mode `L`, at most 768 pixels a side.
    """

    name: str
    image: Image.Image | None = None
    quality_warnings: Sequence[str] = ()
    header: AgeAndView = UNSTATED
    hides: str = ""
    cause: str | None = None
    shown: Image.Image | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.image is not None:
            small = self.image if self.image.mode == "L" else to_8_bit(self.image)
            scale = min(1.0, LONGEST_SIDE / max(small.size))
            size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
            object.__setattr__(self, "shown", small.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def read_upload(path: Path) -> Radiograph:
    """Read one file; a file that cannot be used gives its cause, without the path."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpcxrError(f"{path}: larger than {MAX_BYTES // 2**20} MB")
        image, found = read_with_quality_warnings(path, full_depth=True)
        return Radiograph(path.name, image, found, read_age_and_view(path))
    except SpcxrError as error:
        cause = str(error).replace(f"{path}: ", "")
    except FileNotFoundError:
        cause = "the file is gone; drop it again"
    except Exception as error:  # libraries raise any type on damaged files; the demo must continue
        cause = f"cannot be used ({type(error).__name__})"
    return Radiograph(path.name, cause=cause)


def read_example() -> Radiograph:
    """The radiograph that pydicom-data has installed; one with a cause where it is missing."""
    try:
        found = read_upload(example_radiograph())
    except SpcxrError as error:
        return Radiograph("example", cause=str(error))
    return Radiograph(found.name, found.image, found.quality_warnings, found.header, EXAMPLE_HIDES, found.cause)


def made_radiograph() -> Radiograph:
    """A synthetic radiograph: two dark lungs in a bright body, with spine, heart and ribs."""
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
    return Radiograph("made-radiograph.png", Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)))


# ---- answers -----------------------------------------------------------------------------------------------------


class Map(NamedTuple):
    """A relevance map: its target (None: the embedding), the picture, the share inside the lungs, and how many times
    the average patch's relevance the most relevant patch has."""

    target: str | None
    picture: Image.Image
    share: float | None
    peak: float


@dataclass(frozen=True)
class Answer:
    """What is shown of a radiograph. What a task has none of is None or empty.

    Attributes:
        model: What the checkpoint is called.
        prediction: As `tasks.Predictor` gives it: `probabilities`, `operating_point`, `targets`.
        embedding: (D) float32.
        lungs: The picture with the lungs tinted, or structures outlined, and the areas of the lungs as shares of the
            image.
        cardiothoracic_ratio: Of a model that knows the heart; None where it was not found.
        maps: Relevance, for the most probable label, and for the target that the verdict is about.
        neighbors: The nearest images of the index, each with its picture where its id is a file that can be read;
            None without an index.
    """

    choice: Choice
    model: str
    prediction: dict[str, Any] | None = None
    embedding: torch.Tensor | None = None
    lungs: tuple[Image.Image, LungAreas] | None = None
    cardiothoracic_ratio: float | None = None
    maps: Sequence[Map] = ()
    neighbors: list[tuple[Neighbor, Image.Image | None]] | None = None


class Session:
    """Reads files and computes answers; shared by all visitors, who share the models and nothing else.

    Args:
        choices: From `list_choices`.
        index: Where neighbors are searched.
        device: As of `load_model`.
    """

    def __init__(self, choices: Sequence[Choice], index: NeighborIndex | None = None, device: str = "auto") -> None:
        self.choices = {choice.name: choice for choice in choices}
        self.index, self.device = index, device
        self._models: dict[str, Loaded] = {}
        self._read: WeakValueDictionary[Path, Radiograph] = WeakValueDictionary()
        # One forward pass at a time: a second would only take the cores from the first.
        self._lock = threading.Lock()

    def read(self, paths: Sequence[Path]) -> list[Radiograph]:
        """Read uploaded files and remove every one of them.

        An upload's folder is named by a hash of its content. So where two visitors drop the same file at the same
        moment, the radiograph of the one serves the other, whose file is gone by then.
        """
        found: list[Radiograph] = []
        pixels = 0
        try:
            for path in paths[:MAX_FILES]:
                radiograph = (self._read.get(path) if not path.exists() else None) or read_upload(path)
                if radiograph.image is not None:
                    pixels += radiograph.image.width * radiograph.image.height
                    if pixels > MAX_PIXELS:
                        cause = f"too much at once: more than {MAX_PIXELS // 10**6} million pixels in all"
                        radiograph = Radiograph(path.name, cause=cause)
                self._read[path] = radiograph
                found.append(radiograph)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        return found

    def reasons(self, radiograph: Radiograph, name: str) -> list[str]:
        """Reasons why the model's answer is unreliable for this radiograph."""
        choice = self.choices.get(name)
        found = list(radiograph.quality_warnings)
        if choice is not None:
            found += use_warnings(choice.intended_use, radiograph.header)
            found += [radiograph.hides] if radiograph.hides and choice.task == "classification" else []
        return found

    def answer(self, radiograph: Radiograph, name: str) -> Answer:
        """The chosen checkpoint's answer."""
        if radiograph.image is None:
            raise SpcxrError(f"{radiograph.name}: {radiograph.cause}")
        if name not in self.choices:
            raise SpcxrError(f"no task {name!r}; there are {', '.join(self.choices)}")
        with self._lock:
            return self._answer(radiograph, self.choices[name])

    def _answer(self, radiograph: Radiograph, choice: Choice) -> Answer:
        loaded = self._load(choice)
        model = Path(choice.model).name if Path(choice.model).is_dir() else loaded.name
        grey = torch.from_numpy(np.asarray(radiograph.shown, dtype=np.float32) / 255)
        mask, lungs, embedding, neighbors = None, None, None, None
        segmenter = loaded if choice.task == "segmentation" else self._first("segmentation")
        if segmenter is not None:
            batch = _batch(radiograph, segmenter)
            check_lungs(segmenter)
            masks = segment_structures(segmenter, batch.pixel_values(), [batch.images[0].size])[0]
            mask = lungs_of(masks)
            lungs = (to_picture(overlay(grey, mask)), measure_lungs(mask.numpy()))
            if choice.task == "segmentation":
                widths = SpcxrImageProcessorPil.cardiothoracic_widths(masks)
                if "lung" not in masks:
                    lungs = (draw_structures(grey, masks, widths), lungs[1])
                ratio = SpcxrImageProcessorPil.cardiothoracic_ratio(masks)
                return Answer(choice, model, lungs=lungs, cardiothoracic_ratio=ratio)
        batch = _batch(radiograph, loaded)
        prediction, targets = None, [None]
        if choice.task == "classification":
            prediction = Predictor(loaded)(loaded, batch)[0]
            probable = max(prediction["probabilities"], key=prediction["probabilities"].__getitem__)
            targets = list(dict.fromkeys([probable, *list(prediction["targets"])[:1]]))
        maps = []
        for target in targets:
            relevance = explain(loaded.model, batch.pixel_values(), target, METHODS[0])[0].cpu()
            share = float("nan") if mask is None else share_inside(relevance, mask)
            picture = to_picture(draw_explanation(grey, relevance, mask))
            peak = float(relevance.max() / relevance.mean()) if relevance.any() else 0.0
            maps.append(Map(target, picture, share if share == share else None, peak))
        if (encoder := self._first("embedding")) is not None:
            with torch.inference_mode():
                outputs = forward(encoder.model, _batch(radiograph, encoder).pixel_values())
            embedding = outputs.pooler_output[0].float().cpu()
            if self.index is not None:
                nearest = self.index.search(embedding.unsqueeze(0), NEIGHBORS)[0]
                neighbors = [(one, neighbor_picture(one.id)) for one in nearest]
        shown = embedding if choice.task == "embedding" else None
        return Answer(choice, model, prediction, shown, lungs, maps=maps, neighbors=neighbors)

    def _load(self, choice: Choice) -> Loaded:
        if choice.name not in self._models:
            self._models[choice.name] = load_model(choice.task, choice.model, self.device)
        return self._models[choice.name]

    def _first(self, task: str) -> Loaded | None:
        """The first checkpoint of a task."""
        found = next((choice for choice in self.choices.values() if choice.task == task), None)
        return None if found is None else self._load(found)


def _batch(radiograph: Radiograph, loaded: Loaded) -> Batch:
    """The size is that of the pictures shown, so that masks are made at that size."""
    pixel_values = loaded.processor(radiograph.image, return_tensors="pt").pixel_values[0]
    shown: Any = radiograph.shown
    source = Source(Path(radiograph.name), radiograph.name)
    return Batch([Prepared(source, pixel_values, (shown.height, shown.width), list(radiograph.quality_warnings))], [])


def neighbor_picture(name: str) -> Image.Image | None:
    """The picture behind an id of the index; None where it is no file, or none that can be read."""
    try:
        image = read_radiograph(name, strict=None) if Path(name).is_file() else None
    except (SpcxrError, OSError, ValueError):
        return None
    if image is not None:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
