"""A batch through a model to records: predict, embed, segment, reconstruct, explain.

Each takes what `inference` loads and reads and returns a record per image, in order: a dict with `path`, the task's own
findings, `model`, `warnings` and `note`. Nothing in a record is a diagnosis: a probability lies above or below a
threshold, and the threshold has a name.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from spcxr_hf.drawing import font_for, to_grey, with_words
from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import RESEARCH_NOTICE, write_png
from spcxr_hf.images.reader import read_radiograph
from spcxr_hf.inference.dicom_seg import SourceError, check_highdicom, write_segmentation
from spcxr_hf.inference.explain import draw_explanation, explain, share_inside, target_matrix
from spcxr_hf.inference.pipeline import Answer, Batch, Failed, Loaded, Prepared, Source, answers, prepare
from spcxr_hf.inference.writers import check_output, choose_format, finished, open_writer
from spcxr_hf.models.loading import forward, is_sigmoid, label_names, probabilities
from spcxr_hf.models.lungs import measure_lungs, segment_lungs
from spcxr_hf.transforms.group_masking import FILL_MODES, GroupMasking, as_pixels

Record = dict[str, Any]
ERROR_TIMES = 4  # errors are small: white is a quarter of the range of grey values
PANELS = ("clean", "corrupted", "reconstructed", f"error (x {ERROR_TIMES})")
LONGEST_SIDE = 1024  # pixels of a picture over a radiograph
SMALLEST_SIDE = 448  # a smaller radiograph is enlarged
GAP = 6  # pixels between tiles
TILE = 224  # about as many pixels has a side of a tile


def _record(loaded: Loaded, image: Prepared, **found: Any) -> Record:
    frame = {"model": loaded.name, "warnings": image.warnings, "note": RESEARCH_NOTICE}
    return {"path": str(image.source.path), **found, **frame}


# ---- predict -----------------------------------------------------------------------------------------------------


class Predictor:
    """Probabilities of a classifier, and on which side of its operating points they lie.

    Probabilities are the softmax or, for several labels at once, the sigmoid of the logits; calibration is part of a
    checkpoint's head.

    Args:
        loaded: A classifier.
        operating_point: Which of the checkpoint's; by default the one that it names itself.

    Raises:
        SpcxrError: the model is for regression, or has no such operating point.
    """

    def __init__(self, loaded: Loaded, operating_point: str | None = None) -> None:
        config = loaded.model.config
        if config.problem_type == "regression":
            raise SpcxrError(f"{loaded.name}: a regression model gives no probabilities")
        self.labels = label_names(config)
        self.exclusive = not is_sigmoid(config)
        self.point, self.thresholds = choose_operating_point(config, operating_point)
        for target in self.thresholds:
            self._members(target)

    @torch.inference_mode()
    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `probabilities` by label, and by target the `probability` and its `decision`.

        Of labels that exclude each other, `label` is the most probable; it knows nothing of thresholds.
        """
        logits = forward(loaded.model, batch.pixel_values()).logits
        values = probabilities(loaded.model.config, logits).cpu()
        if not values.isfinite().all():
            raise SpcxrError(f"{loaded.name}: the model's answers are not finite numbers; the checkpoint is damaged")
        return [
            _record(loaded, image, **self._judge(row)) for image, row in zip(batch.images, values.tolist(), strict=True)
        ]

    def _judge(self, row: Sequence[float]) -> Record:
        by_label = dict(zip(self.labels, row, strict=True))
        targets = {}
        for target, threshold in self.thresholds.items():
            probability = min(1.0, sum(by_label[label] for label in self._members(target)))
            decision = "above" if probability >= threshold else "below"
            targets[target] = {"probability": probability, "decision": decision, "threshold": threshold}
        likeliest = {"label": max(by_label, key=by_label.__getitem__)} if self.exclusive else {}
        return {**likeliest, "probabilities": by_label, "operating_point": self.point, "targets": targets}

    def _members(self, target: str) -> list[str]:
        """The labels whose probabilities a target adds up."""
        members = [target] if target in self.labels else target.split(" + ")
        if unknown := [label for label in members if label not in self.labels]:
            raise SpcxrError(f"an operating point is for {unknown[0]!r}, but the labels are {', '.join(self.labels)}")
        return members


def choose_operating_point(config: Any, name: str | None = None) -> tuple[str | None, dict[str, float]]:
    """The operating point's name and its threshold by target; none where the checkpoint has none.

    Raises:
        SpcxrError: no target has an operating point of that name.
    """
    points: Mapping[str, Mapping[str, float]] = getattr(config, "operating_points", None) or {}
    names = list(dict.fromkeys(known for thresholds in points.values() for known in thresholds))
    if name is not None and name not in names:
        raise SpcxrError(f"no operating point {name!r}; the checkpoint has {', '.join(names) or 'none'}")
    chosen: Any = name or getattr(config, "operating_point", None) or next(iter(names), None)
    return chosen, {target: values[chosen] for target, values in points.items() if chosen in values}


# ---- embed -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(loaded: Loaded, batch: Batch) -> list[Record]:
    """A record per image: `embedding`, the pooled vector, as a list of D numbers."""
    pooled = forward(loaded.model, batch.pixel_values()).pooler_output.float().cpu()
    if not pooled.isfinite().all():
        raise SpcxrError(f"{loaded.name}: the model's answers are not finite numbers; the checkpoint is damaged")
    return [_record(loaded, image, embedding=row) for image, row in zip(batch.images, pooled.tolist(), strict=True)]


# ---- segment -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def segment(loaded: Loaded, batch: Batch, save: Callable[[np.ndarray, Prepared], Path]) -> list[Record | Failed]:
    """A record per image: `mask`, where it was saved, and `lung_area` as shares of the image.

    An image of which no DICOM segmentation can be made is a `Failed` instead.

    Args:
        loaded: A segmentation model with a label "lung".
        batch: Images.
        save: Takes a mask (height, width), boolean, of the image's own size, and returns its file.

    Raises:
        SpcxrError: the model has no such label, or a mask cannot be saved.
    """
    masks = segment_lungs(loaded, batch.pixel_values(), [image.size for image in batch.images])
    found: list[Record | Failed] = []
    for image, lungs in zip(batch.images, masks, strict=True):
        mask = lungs.numpy()
        try:
            found.append(_record(loaded, image, mask=str(save(mask, image)), lung_area=_areas(mask)))
        except SourceError as error:
            found.append(Failed(image.source, str(error)))
    return found


def mask_saver(mask_format: str, model: str) -> tuple[Callable[..., Path], str]:
    """How masks are saved, and the suffix of their files: "png" (white is lung) or "seg" (DICOM segmentations).

    Returns:
        A function of a mask (height, width), its image and where the picture of a source goes; and ".png" or ".dcm".

    Raises:
        SpcxrError: there is no such format, or its package is missing.
    """
    if mask_format not in ("png", "seg"):
        raise SpcxrError(f"no mask format {mask_format!r}; there are png and seg")
    if mask_format == "seg":
        check_highdicom()

    def save(mask: np.ndarray, image: Prepared, place: Callable[[Source], Path]) -> Path:
        path = place(image.source)
        if mask_format == "seg":
            write_segmentation(mask, image.source.path, path, model)
        else:
            write_png(Image.fromarray(mask.astype(np.uint8) * 255), path)
        return path

    return save, ".png" if mask_format == "png" else ".dcm"


def _areas(mask: np.ndarray) -> dict[str, float]:
    """Shares of the image. In a frontal view the image's left is the patient's right."""
    areas = measure_lungs(mask)
    return {"total": areas.total, "image_left": areas.image_left, "image_right": areas.image_right}


# ---- reconstruct -------------------------------------------------------------------------------------------------


class Reconstructor:
    """Corrupts each image in several ways, the same at every start, and draws what the model makes of it.

    Args:
        save: Takes a picture and the image it is of, and returns its file.
        fill_modes: What the corrupted groups hold: "noise", "zeros", "block", "replace".
        seed: Where the groups lie; every image has the same ones.
        second: `pixel_values` (C, H, W) of the image that "replace" takes its pixels from.

    Raises:
        SpcxrError: there is no such fill, or "replace" has no second image.
    """

    def __init__(
        self,
        save: Callable[[Image.Image, Prepared], Path],
        fill_modes: Sequence[str] = FILL_MODES[:3],
        seed: int = 0,
        second: torch.Tensor | None = None,
    ) -> None:
        GroupMasking(fill_modes=tuple(fill_modes))  # refuses unknown ones
        if "replace" in fill_modes and second is None:
            raise SpcxrError("the fill replace takes its pixels from a second image: give --second FILE")
        self.save, self.fill_modes, self.seed, self.second = save, tuple(dict.fromkeys(fill_modes)), seed, second

    @torch.inference_mode()
    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `picture`, and by fill the `masked` share and the mean absolute `error` in it (0..1)."""
        return [self._reconstruct(loaded, image) for image in batch.images]

    def _reconstruct(self, loaded: Loaded, image: Prepared) -> Record:
        clean = image.pixel_values.unsqueeze(0)
        corrupted, masks = zip(*(self._corrupt(clean, fill) for fill in self.fill_modes), strict=True)
        images, mask = torch.cat(corrupted), torch.cat(masks)
        reconstruction = forward(loaded.model, images).reconstruction.float().cpu()
        reconstruction = as_pixels(loaded.model.config, reconstruction, clean)
        composed = torch.where(mask, reconstruction, clean)
        mean, std = loaded.processor.image_mean[0], loaded.processor.image_std[0]
        grey, corrupted_grey, composed_grey = (to_grey(values, mean, std) for values in (clean, images, composed))
        error = (composed_grey - grey).abs()
        found, rows = {}, {}
        for row, fill in enumerate(self.fill_modes):
            pixels = mask[row, 0]
            found[fill] = {"masked": pixels.float().mean().item(), "error": error[row][pixels].mean().item()}
            rows[fill] = [grey[0], corrupted_grey[row], composed_grey[row], ERROR_TIMES * error[row]]
        picture = self.save(draw_rows(rows, PANELS), image)
        return _record(loaded, image, picture=str(picture), seed=self.seed, fills=found)

    def _corrupt(self, clean: torch.Tensor, fill: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = clean if fill != "replace" or self.second is None else torch.cat((clean, self.second.unsqueeze(0)))
        found = GroupMasking(fill_modes=(fill,))(images, torch.Generator().manual_seed(self.seed))
        return found.pixel_values[:1], found.mask[:1]


def read_second(loaded: Loaded, path: Path) -> torch.Tensor:
    """`pixel_values` (C, H, W) of the image that "replace" takes its pixels from.

    Raises:
        SpcxrError: it cannot be used.
    """
    seen = prepare(Source(path, path.name), loaded.processor)
    if isinstance(seen, Failed):
        raise SpcxrError(seen.cause)
    return seen.pixel_values


def draw_rows(rows: Mapping[str, Sequence[torch.Tensor]], titles: Sequence[str]) -> Image.Image:
    """A grid of grey tiles (H, W) in 0 .. 1, all of one size: a row for each name, a column for each title.

    Small tiles are enlarged, pixel by pixel, so that what the model saw stays what is seen.
    """
    height, width = next(iter(rows.values()))[0].shape
    times = max(1, round(TILE / max(height, width)))
    height, width = height * times, width * times
    font = font_for(len(titles) * width)
    title = round(1.6 * font.size)
    canvas = Image.new("L", (len(titles) * (width + GAP) - GAP, len(rows) * (height + title + GAP)), 255)
    pen = ImageDraw.Draw(canvas)
    for y, (name, tiles) in enumerate(rows.items()):
        top = y * (height + title + GAP)
        for x, (words, tile) in enumerate(zip(titles, tiles, strict=True)):
            pen.text((x * (width + GAP), top), f"{words}: {name}" if x == 1 else words, fill=0, font=font)
            grey = Image.fromarray((tile.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
            canvas.paste(grey.resize((width, height), Image.Resampling.NEAREST), (x * (width + GAP), top + title))
    return with_words(canvas, [f"{RESEARCH_NOTICE.capitalize()}."])


# ---- explain -----------------------------------------------------------------------------------------------------


class Explainer:
    """Draws which parts of each radiograph a model's answer rests on, over the radiograph, the lungs outlined.

    Args:
        loaded: A classifier; for the target None any SPCXR model.
        save: Takes a picture and the image it is of, and returns its file.
        target: A label, or labels joined by " + "; "probable" is each image's most probable label; None the embedding.
        method: "relevance" or "rollout" (`explain.explain`).
        lungs: A segmentation model for the outline and the share of relevance inside the lungs; None leaves both out.

    Raises:
        SpcxrError: the model has no such label.
    """

    def __init__(
        self,
        loaded: Loaded,
        save: Callable[[Image.Image, Prepared], Path],
        target: str | None = "probable",
        method: str = "relevance",
        lungs: Loaded | None = None,
    ) -> None:
        self.save, self.target, self.method, self.lungs = save, target, method, lungs
        if target not in (None, "probable"):
            target_matrix(loaded.model, target, 1)  # refuses what is no label

    def __call__(self, loaded: Loaded, batch: Batch) -> list[Record]:
        """A record per image: `picture`, `target`, `method`, and `relevance_in_lungs` beside `lung_area` (0 .. 1)."""
        pixel_values = batch.pixel_values()
        names = self._targets(loaded, pixel_values)
        targets = None if self.target is None else [str(name) for name in names]
        maps = explain(loaded.model, pixel_values, targets, self.method).cpu()
        return [
            self._draw(loaded, image, name, one) for image, name, one in zip(batch.images, names, maps, strict=True)
        ]

    @torch.inference_mode()
    def _targets(self, loaded: Loaded, pixel_values: torch.Tensor) -> list[str | None]:
        if self.target != "probable":
            return [self.target] * len(pixel_values)
        names = label_names(loaded.model.config)
        return [names[index] for index in forward(loaded.model, pixel_values).logits.argmax(dim=-1).tolist()]

    def _draw(self, loaded: Loaded, image: Prepared, target: str | None, relevance: torch.Tensor) -> Record:
        radiograph = read_radiograph(image.source.path, strict=None)
        radiograph = _of_good_size(radiograph)
        mask = self._lungs_of(image)
        grey = torch.from_numpy(np.asarray(radiograph, dtype=np.float32) / 255)
        colour = draw_explanation(grey, relevance, mask)
        picture = Image.fromarray((colour.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
        found: Record = {"target": target or "embedding", "method": self.method}
        if mask is not None:
            share = share_inside(relevance, mask)
            found |= {"relevance_in_lungs": share if share == share else None, "lung_area": mask.float().mean().item()}
        path = self.save(with_words(picture, _below_map(found)), image)
        return _record(loaded, image, picture=str(path), **found)

    def _lungs_of(self, image: Prepared) -> torch.Tensor | None:
        if self.lungs is None:
            return None
        seen = prepare(image.source, self.lungs.processor)
        if isinstance(seen, Failed):
            raise SpcxrError(seen.cause)
        return segment_lungs(self.lungs, seen.pixel_values.unsqueeze(0), [seen.size])[0]


def _of_good_size(radiograph: Image.Image) -> Image.Image:
    """No side longer than `LONGEST_SIDE`, the longer one not below `SMALLEST_SIDE`, so that words fit under it."""
    longer = max(radiograph.size)
    scale = min(1.0, LONGEST_SIDE / longer) if longer >= SMALLEST_SIDE else SMALLEST_SIDE / longer
    size = [max(1, round(side * scale)) for side in radiograph.size]
    return radiograph.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _below_map(found: Record) -> list[str]:
    """The words under a map."""
    target = "the embedding" if found["target"] == "embedding" else found["target"]
    said = f"{found['method'].capitalize()} for {target}"
    if found.get("relevance_in_lungs") is not None:
        area = f"lungs: {found['lung_area']:.0%} of the image"
        said += f"; {found['relevance_in_lungs']:.0%} of it inside the lungs ({area})"
    return [f"{said}.", "What the model used, not where a disease is.", f"{RESEARCH_NOTICE.capitalize()}."]


ALL_DONE, NOTHING_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 3, 130


@dataclass
class Outcome:
    """How many files came to what."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 nothing could be done, 3 some files failed, 130 interrupted."""
        if self.interrupted:
            return INTERRUPTED
        if not self.failed:
            return ALL_DONE
        return SOME_FAILED if self.done or self.skipped else NOTHING_DONE

    def __str__(self) -> str:
        rate = f" ({self.done / self.seconds:.1f} images/s)" if self.seconds and self.done else ""
        images = "1 image" if self.done == 1 else f"{self.done} images"
        parts = [f"{images} in {self.seconds:.1f} s{rate}"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.skipped} {'was' if self.skipped == 1 else 'were'} done before"] if self.skipped else []
        parts += ["interrupted; what is written is whole"] if self.interrupted else []
        return "; ".join(parts)


@dataclass
class Job:
    """Files to be answered for, and where the records go.

    Attributes:
        sources: The files.
        output: File of the records; None is standard output.
        stated: Its format, where its suffix does not say it.
        resume: Leave out files whose records are in `output`.
        overwrite: Replace `output`.
        batch_size: Images per forward pass.
        workers: Threads that read.
        picture_of: Where the picture made of a file lies, for tasks that make one: with `resume`, a file whose picture
            is missing is not finished.

    Raises:
        SpcxrError: the output cannot be used, or would destroy what is there.
    """

    sources: Sequence[Source]
    output: Path | None = None
    stated: str | None = None
    resume: bool = False
    overwrite: bool = False
    batch_size: int = 16
    workers: int | None = None
    picture_of: Callable[[Source], Path] | None = None
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = choose_format(self.output, self.stated, sys.stdout.isatty())
        by_picture = self.resume and self.picture_of is not None and self.output is None
        check_output(self.output, self.resume and not by_picture, self.overwrite)
        if self.picture_of is not None and not (self.resume or self.overwrite):
            self._refuse_pictures(self.picture_of)

    def _refuse_pictures(self, picture_of: Callable[[Source], Path]) -> None:
        there = next((picture for source in self.sources if (picture := picture_of(source)).exists()), None)
        if there:
            raise SpcxrError(f"{there}: is there already; --resume leaves it, --overwrite makes all anew")

    def run(self, loaded: Loaded, answer: Answer) -> Outcome:
        """Answer for every file, tell of broken ones on standard error, and end with a line on how it went."""
        known = finished(self.output, self.kind, loaded.name) if self.resume else set()
        sources = [source for source in self.sources if not self._is_finished(source, known)]
        outcome = Outcome(skipped=len(self.sources) - len(sources))
        started = time.perf_counter()
        with (
            _stop_on_signal() as stop,
            open_writer(self.output, self.kind, self.resume) as writer,
            _progress(len(sources)) as advance,
        ):
            for step in answers(loaded, sources, answer, self.batch_size, self.workers):
                # a file whose picture alone was missing has its record already
                writer.write([record for record in step.records if record["path"] not in known])
                for failed in step.failed:
                    print(f"error: {printable(failed.cause)}", file=sys.stderr)
                outcome.done += len(step.records)
                outcome.failed += len(step.failed)
                advance(len(step.records) + len(step.failed))
                if stop.is_set():
                    outcome.interrupted = True
                    break
        outcome.seconds = time.perf_counter() - started
        print(f"{outcome}. {RESEARCH_NOTICE.capitalize()}.", file=sys.stderr)
        return outcome

    def _is_finished(self, source: Source, known: set[str]) -> bool:
        has_record = self.output is None or str(source.path) in known
        return self.resume and has_record and (self.picture_of is None or self.picture_of(source).is_file())


# ---- pictures ----------------------------------------------------------------------------------------------------


def picture_names(sources: Sequence[Source], folder: Path, suffix: str = ".png") -> Callable[[Source], Path]:
    """Where the picture made of each file goes: its own name, and the suffix behind it where it has another.

    Raises:
        SpcxrError: two files would have the same picture, or a picture would replace a file that it is made of.
    """

    def name(source: Source) -> Path:
        own = source.name if source.name.lower().endswith(suffix) else source.name + suffix
        return folder / own

    taken: dict[Path, Source] = {}
    inputs = {source.path.resolve() for source in sources}
    for source in sources:
        picture = name(source)
        if picture in taken:
            raise SpcxrError(
                f"{picture}: would be made of {taken[picture].path} and of {source.path}; give the folder above them"
            )
        if picture.resolve() in inputs:
            raise SpcxrError(f"{picture}: would be written over an input; give another folder")
        taken[picture] = source
    return name


# ---- while it runs -----------------------------------------------------------------------------------------------


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM set the event, so that the batch at hand is finished; a second one breaks off at once."""
    stop = threading.Event()

    def ask(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be listened to
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal, with images per second and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    # What goes to standard output must not be redirected to the bar's console, which is standard error.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
