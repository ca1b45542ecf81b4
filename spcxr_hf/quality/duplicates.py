"""Leaks: a patient, or nearly the same image, on two sides of a split, within a set or between sets.

check_leaks -> find_patient_leaks
            -> read_thumbnails -> find_duplicates -> _candidates (every pair, coarse) -> _verify (few pairs, aligned)

Two pictures count as one where a part of one (at least about four fifths of its width and of its height) shows what the
whole of the other shows, whatever the resolution, compression, brightness or contrast. Not looked for: smaller crops,
rotated copies, a wide frame around a picture, two crops that each lack much of what the other shows.

Every pair is compared by short descriptors, of the whole picture on one side and of 49 windows of it on the other; what
is similar enough is aligned and compared by the correlation of its finest detail. Chest radiographs are alike
as a kind: descriptors are whitened, so that what all of them share counts for little.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf.data.table import RadiographTable, open_image
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import in_threads
from spcxr_hf.images.reader import to_8_bit

Leaks = Literal["no", "patients", "images", "all"]  # which of them are allowed
# Chosen on one half of the development radiographs and measured on the other: benchmarks/check_leaks.py.
SAME_IMAGE = 0.77
CANDIDATE_COSINE = 0.66

THUMBNAIL = 64  # pixels; ribs are still seen
FREQUENCIES = 10  # of the cosine transform, along either axis; below this radius 82 of them are used
WINDOWS = ((0.0, 1.0), (0.0, 0.9), (0.1, 1.0), (0.05, 0.95), (0.0, 0.82), (0.09, 0.91), (0.18, 1.0))  # per axis
OVERHANG = 0.08  # how far over the edge of a picture the other may lie
WHITENING_SAMPLE = 1500  # images that say what all images share
BLOCK, QUERIES = 1024, 512  # images at once: 70 MB of descriptors against 2 MB of similarities
PER_QUERY = 8  # candidates of an image among the images of a block, where a set is full of copies
PAIRS_AT_ONCE = 64  # what they need stays in the processor's cache

# What contrast is normalised over, as a share of the width: the wider, the more a pair may be out of place.
TO_FIND, TO_PLACE, TO_JUDGE = 0.4, 0.16, 0.06
# Sweeps over the four edges of a window: at 32 pixels, then at 64 for those pairs that are at least this alike.
COARSE_STEPS, FINE_STEPS, WORTH_A_LOOK = (0.04, 0.02), (0.015, 0.0075), 0.75
EXAMPLES = 3
SIDES = ("train", "val", "test", "shift")  # from the least to the most important


# ---- results --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two images that are nearly the same: their row numbers, and their correlation once aligned, at most 1."""

    first: int
    second: int
    similarity: float
    flipped: bool = False


@dataclass(frozen=True)
class PatientLeak:
    """A patient on several sides: ids of the images, by side."""

    patient: str
    ids: dict[str, list[str]]

    def __str__(self) -> str:
        places = " and ".join(f"{side} ({', '.join(ids[:2])})" for side, ids in self.ids.items())
        return f"patient {self.patient!r} in {places}"


@dataclass(frozen=True)
class ImageLeak:
    """Two nearly equal images on different sides."""

    first_side: str
    first: str
    second_side: str
    second: str
    similarity: float
    flipped: bool = False

    def __str__(self) -> str:
        mirrored = ", mirrored" if self.flipped else ""
        return (
            f"{self.first_side} {self.first!r} and {self.second_side} {self.second!r} "
            f"(correlation {self.similarity:.2f}{mirrored})"
        )


@dataclass(frozen=True)
class LeakReport:
    """What `check_leaks` found.

    Attributes:
        rows: Images of each side.
        unknown_patients: Rows that name no patient; they are in no patient leak.
        patients: Patients on several sides.
        images: Nearly equal images on different sides, the most alike first; None where images were not compared.
        broken: Name of each image that could not be read, and the cause.
    """

    rows: dict[str, int]
    unknown_patients: int
    patients: list[PatientLeak]
    images: list[ImageLeak] | None = None
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether there is a leak."""
        return bool(self.patients or self.images)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return asdict(self)

    def __str__(self) -> str:
        """One line: how many leaks, and the first of them."""
        if not self.found:
            return "no leak found" + (" (images were not compared)" if self.images is None else "")
        kinds: list[tuple[Sequence[PatientLeak | ImageLeak], str]] = [
            (self.patients, "patient(s) on several sides"),
            (self.images or [], "nearly equal image pair(s)"),
        ]
        return "; ".join(
            f"{len(leaks)} {kind}: " + "; ".join(map(str, leaks[:EXAMPLES])) + (", ..." if leaks[EXAMPLES:] else "")
            for leaks, kind in kinds
            if leaks
        )


# ---- sides -----------------------------------------------------------------------------------------------------


def check_leaks(
    tables: RadiographTable | Mapping[str, RadiographTable],
    split_column: str | None = None,
    *,
    sides: Sequence[str] | None = None,
    patient_column: str = "patient",
    images: bool = True,
    flips: bool = False,
    workers: int | None = None,
) -> LeakReport:
    """Look for patients and near-duplicate images on two sides, within a set or between sets.

    Args:
        tables: A set, or several by name. Patients are compared by name: where two sets name different people alike,
            put the set's name before theirs.
        split_column: Whose values are the sides, over all sets; a row without a value is on no side. Without it, each
            set is a side.
        sides: Only these sides; all of them by default.
        patient_column: May be missing from a set: its patients are unknown then.
        images: Whether to compare images (minutes for 20,000) or patients alone (at once).
        flips: Whether to compare mirrored images too (twice the time).
        workers: Threads that decode; by default one for each processor, at most 8.

    Raises:
        SpcxrError: there is nothing to compare, no such column, or a side without rows.
    """
    named = {tables.name: tables} if isinstance(tables, RadiographTable) else dict(tables)
    names: list[str] = []  # of the rows of all tables, one after the other, as the next two
    places: list[str | None] = []
    patients: list[str | None] = []
    for name, table in named.items():
        splits = [name] * len(table) if split_column is None else table.column(split_column)
        places += [None if split is None else str(split) for split in splits]
        names += table.ids if len(named) == 1 else [f"{name}: {row}" for row in table.ids]
        patients += known_patients(table, patient_column)
    wanted = _wanted_sides(places, sides, "/".join(named))
    places = [side if side in wanted else None for side in places]
    counts = {side: places.count(side) for side in wanted}
    unknown = sum(patient is None for patient, side in zip(patients, places, strict=True) if side is not None)
    shared = find_patient_leaks(patients, places, names)
    if not images:
        return LeakReport(counts, unknown, shared)
    kept = [row for row, side in enumerate(places) if side is not None]
    thumbnails, broken = read_thumbnails(named.values(), kept, workers)
    found = [
        ImageLeak(
            str(places[kept[pair.first]]), names[kept[pair.first]],
            str(places[kept[pair.second]]), names[kept[pair.second]],
            round(pair.similarity, 4), pair.flipped,
        )
        for pair in find_duplicates(thumbnails, sides=[places[row] for row in kept], flips=flips)
    ]  # fmt: skip
    return LeakReport(counts, unknown, shared, found, {names[kept[row]]: cause for row, cause in broken.items()})


class LeakError(SpcxrError):
    """A split leaks; `report` says how."""

    def __init__(self, message: str, report: LeakReport):
        super().__init__(message)
        self.report = report


def refuse_leaks(
    table: RadiographTable,
    split_column: str,
    sides: Sequence[str] | None = None,
    *,
    allow: Leaks = "no",
    images: bool = True,
    patient_column: str = "patient",
    workers: int | None = None,
) -> LeakReport:
    """Check a split before it is trained on.

    Args:
        sides: The splits in use; by default all values of the column.
        allow: Which leaks are warned of instead of refused: none, patients', images', or all.
        images: Compare the images too, not the patients alone; on one core 3 s for 1,000 images, 30 s for 12,000.
        patient_column, workers: As for `check_leaks`.

    Raises:
        LeakError: the split leaks; the message says how often, and gives the first examples.
        SpcxrError: `allow` is another word, or what `check_leaks` raises.
    """
    if allow not in get_args(Leaks):
        raise SpcxrError(f"allow must be {', '.join(get_args(Leaks))}; got {allow!r}")
    report = check_leaks(
        table, split_column, sides=sides, images=images, patient_column=patient_column, workers=workers
    )
    refused = (report.patients and allow not in ("patients", "all"), report.images and allow not in ("images", "all"))
    if report.found:
        message = f"{table.name}: {split_column} leaks: {report}"
        if any(refused):
            raise LeakError(message, report)
        warnings.warn(message, stacklevel=2)
    return report


def copies_to_leave_out(pairs: Iterable[tuple[str, str]], side_of: Mapping[str, str | None]) -> set[str]:
    """The image of each leaking pair to leave out, chosen so that the evaluation splits stay unchanged.

    A copy leaves `train` before `val`, `val` before `test`, `test` before `shift`; sides of other names stay before
    these, of two such the one that comes first in the alphabet goes.

    `pairs` are ids of two images that are nearly the same; those on one side, or on none (None in `side_of`), are no
    leak.
    """

    def importance(name: str) -> tuple[int, str]:
        side = str(side_of[name])
        return (SIDES.index(side), "") if side in SIDES else (len(SIDES), side)

    crossing = [
        pair for pair in pairs if None not in (sides := [side_of.get(name) for name in pair]) and len({*sides}) == 2
    ]
    return {min(pair, key=importance) for pair in crossing}


def find_patient_leaks(
    patients: Sequence[str | None], sides: Sequence[str | None], ids: Sequence[str]
) -> list[PatientLeak]:
    """Patients with images on several sides, in the order of their first image; None is an unknown patient or side."""
    places: dict[str, dict[str, list[str]]] = {}
    for patient, side, name in zip(patients, sides, ids, strict=True):
        if patient is not None and side is not None:
            places.setdefault(patient, {}).setdefault(side, []).append(name)
    return [PatientLeak(patient, found) for patient, found in places.items() if len(found) > 1]


def known_patients(table: RadiographTable, column: str = "patient") -> list[str | None]:
    """The patient of each row; None where the set has no such column or the row no value."""
    if column not in table.rows.column_names:
        return [None] * len(table)
    return [None if value is None or value != value or value == "" else str(value) for value in table.column(column)]


def _wanted_sides(places: Sequence[str | None], sides: Sequence[str] | None, name: str) -> list[str]:
    there = list(dict.fromkeys(side for side in places if side is not None))
    wanted = there if sides is None else list(dict.fromkeys(sides))
    missing = [side for side in wanted if side not in there]
    if missing:
        raise SpcxrError(f"{name}: no row is in {missing[0]!r}; there are {', '.join(there) or 'no splits'}")
    if len(wanted) < 2:
        raise SpcxrError(f"{name}: a leak needs two sides; there is {', '.join(wanted) or 'none'}")
    return wanted


# ---- thumbnails ------------------------------------------------------------------------------------------------


def thumbnail(image: Image.Image) -> np.ndarray:
    """A grey image -> (64, 64) uint8, the whole picture whatever its shape."""
    return np.asarray(to_8_bit(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def read_thumbnails(
    tables: Iterable[RadiographTable], kept: Sequence[int] | None = None, workers: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Thumbnails (n, 64, 64) uint8, and place -> cause for images that cannot be read, whose thumbnails are black.

    `kept` are row numbers of the tables laid one after the other; by default all.
    """
    tables = list(tables)
    starts = np.cumsum([0] + [len(table) for table in tables])
    kept = range(starts[-1]) if kept is None else kept
    thumbnails = np.zeros((len(kept), THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    broken: dict[int, str] = {}

    def fill(place: int) -> None:
        number = int(np.searchsorted(starts, kept[place], side="right")) - 1
        row = int(kept[place] - starts[number])
        cell = tables[number].rows["image"][row].as_py()
        try:
            thumbnails[place] = thumbnail(open_image(cell, f"{tables[number].name}: row {row}"))
        except SpcxrError as error:
            broken[place] = str(error)

    in_threads(fill, range(len(kept)), "thumbnails", workers)
    return thumbnails, dict(sorted(broken.items()))


# ---- near-duplicates -------------------------------------------------------------------------------------------


def find_duplicates(
    thumbnails: np.ndarray,
    *,
    sides: Sequence[Any] | None = None,
    flips: bool = False,
    threshold: float = SAME_IMAGE,
    candidate_threshold: float = CANDIDATE_COSINE,
) -> list[Pair]:
    """Pairs of images that are nearly the same, the most alike first.

    Every pair is compared: n^2 x 49 windows x 82 numbers (for 24,000 images, five minutes of one core), in blocks of
    about 100 MB whatever n is. An image without any contrast equals none.

    Args:
        thumbnails: (n, 64, 64) uint8, as `thumbnail` makes them.
        sides: The side of each image: only pairs on different sides are looked for. By default all pairs.
        flips: Compare mirrored images too.
        threshold: Correlation of the aligned images above which they count as one, in -1 .. 1.
        candidate_threshold: Cosine of two descriptors above which a pair is looked at.
    """
    thumbs = torch.as_tensor(np.asarray(thumbnails))
    if thumbs.dtype != torch.uint8 or thumbs.shape[1:] != (THUMBNAIL, THUMBNAIL):
        raise SpcxrError(
            f"thumbnails must be (n, {THUMBNAIL}, {THUMBNAIL}) uint8; got {tuple(thumbs.shape)} {thumbs.dtype}"
        )
    if sides is not None and len(sides) != len(thumbs):
        raise SpcxrError(f"{len(thumbs)} thumbnails, but {len(sides)} sides")
    if len(thumbs) < 2:
        return []
    numbers = torch.arange(len(thumbs)) if sides is None else _number(sides)
    order = numbers.argsort(stable=True)  # side by side: blocks of one side are not compared
    best: dict[tuple[int, int], Pair] = {}
    for flipped in (False, True) if flips else (False,):
        for whole, other, score in _search(thumbs[order], numbers[order], flipped, candidate_threshold):
            key = min(int(order[whole]), int(order[other])), max(int(order[whole]), int(order[other]))
            pair = Pair(*key, score, flipped)
            if pair.similarity > max(threshold, best[key].similarity if key in best else -1):
                best[key] = pair
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _number(sides: Sequence[Any]) -> torch.Tensor:
    numbers = {side: number for number, side in enumerate(dict.fromkeys(sides))}
    return torch.tensor([numbers[side] for side in sides], dtype=torch.long)


@torch.inference_mode()
def _search(
    thumbs: torch.Tensor, sides: torch.Tensor, flipped: bool, threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Candidates with their similarity; a pair comes once for each direction in which it is one."""
    queries = thumbs.flip(-1) if flipped else thumbs
    for wholes, others, windows in _candidates(queries, thumbs, sides, threshold):
        for part in range(0, len(wholes), PAIRS_AT_ONCE):
            chosen = slice(part, part + PAIRS_AT_ONCE)
            scores = _verify(queries[wholes[chosen]], thumbs[others[chosen]], windows[chosen])
            yield from zip(wholes[chosen].tolist(), others[chosen].tolist(), scores.tolist(), strict=True)


def _candidates(
    queries: torch.Tensor, thumbs: torch.Tensor, sides: torch.Tensor, threshold: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each block of images: rows of a whole, rows of an image with a window like it, that window's edges (P, 4)."""
    whiten = _whitening(thumbs)
    edges = torch.tensor([[*across, *down] for down in WINDOWS for across in WINDOWS])  # in the order of `_describe`
    wholes = torch.cat([_describe(part, WINDOWS[:1], whiten)[0] for part in queries.split(BLOCK)])
    progress = tqdm(total=len(thumbs), desc="comparing", unit="image")
    for start in range(0, len(thumbs), BLOCK):
        block = thumbs[start : start + BLOCK]
        parts = _describe(block, WINDOWS, whiten)  # (49, block, 82)
        found = [(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, 4))]
        for first in range(0, len(queries), QUERIES):
            chosen = slice(first, first + QUERIES)
            if len(torch.cat([sides[chosen], sides[start : start + BLOCK]]).unique()) == 1:
                continue  # all on one side
            likeness = _best_window(wholes[chosen], parts)
            likeness[sides[chosen, None] == sides[None, start : start + BLOCK]] = -1
            rows, columns = _above(likeness, threshold).unbind(dim=1)
            windows = torch.einsum("pd,wpd->pw", wholes[chosen][rows], parts[:, columns]).argmax(dim=1)
            found.append((rows + first, columns + start, edges[windows]))
        progress.update(len(block))
        whole, other, window = (torch.cat(column) for column in zip(*found, strict=True))
        yield whole, other, window
    progress.close()


def _best_window(wholes: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Largest cosine (q, b) of each whole (q, 82) over the windows (49, b, 82) of each image."""
    best = wholes @ parts[0].T
    scratch = torch.empty_like(best)
    for part in parts[1:]:
        torch.maximum(best, torch.mm(wholes, part.T, out=scratch), out=best)
    return best


def _above(likeness: torch.Tensor, threshold: float) -> torch.Tensor:
    """Places (P, 2) above the threshold; of a crowd of copies, the likest of each row only."""
    places = (likeness > threshold).nonzero()
    if len(places) <= PER_QUERY * len(likeness):
        return places
    values, columns = likeness.topk(min(PER_QUERY, likeness.shape[1]), dim=1)
    rows = torch.arange(len(likeness))[:, None].expand_as(columns)
    return torch.stack([rows, columns], dim=-1)[values > threshold]


# Descriptors


def _normalise_contrast(thumbs: torch.Tensor, neighbourhood: float) -> torch.Tensor:
    """Subtract the local mean and divide by the local standard deviation: (n, S, S) uint8 -> float32, in -3 .. 3.

    After this a change of brightness, contrast or gamma is gone, and a burnt-in letter counts no more than a rib.
    """
    values, smooth = thumbs.float(), _smoothing(thumbs.shape[-1], neighbourhood)
    detail = values - smooth @ values @ smooth.T
    variance = smooth @ (detail * detail) @ smooth.T
    return (detail / (variance + 4).sqrt()).clamp(-3, 3)


def _smoothing(size: int, neighbourhood: float) -> torch.Tensor:
    """The matrix (S, S) of a moving average along a line, cut at the ends, applied twice: nearly a Gaussian."""
    places = torch.arange(size)
    near = ((places[:, None] - places).abs() < neighbourhood * size / 2).float()
    average = near / near.sum(dim=1, keepdim=True)
    return average @ average


def _describe(
    thumbs: torch.Tensor, windows: Sequence[tuple[float, float]], whiten: torch.Tensor | None
) -> torch.Tensor:
    """Unit vectors (W x W, n, 82): the low frequencies of the cosine transform of each window, whitened.

    A transform of a window is linear and separable, so that one matrix on either side of a thumbnail gives all of them.
    """
    basis = torch.cat([_cosines(left, right) for left, right in windows])  # (W F, S)
    count, size = len(windows), FREQUENCIES
    spectra = (basis @ _normalise_contrast(thumbs, TO_FIND) @ basis.T).reshape(len(thumbs), count, size, count, size)
    steps = torch.arange(size)
    radius = steps[:, None] ** 2 + steps[None, :] ** 2
    kept = (radius > 0) & (radius < (size - 0.5) ** 2)  # the mean is no feature
    vectors = spectra.permute(1, 3, 0, 2, 4)[..., kept].reshape(count * count, len(thumbs), -1)
    has_contrast = vectors.norm(dim=-1, keepdim=True) > 1e-3  # rounding errors of a flat picture are no features
    vectors = F.normalize(vectors, dim=-1)
    return has_contrast * (vectors if whiten is None else F.normalize(vectors @ whiten, dim=-1))


def _cosines(left: float, right: float) -> torch.Tensor:
    """The cosine transform (F, S) of the part of a line of S pixels from `left` to `right`, in 0 .. 1."""
    edges = torch.linspace(0, 1, THUMBNAIL + 1)
    covered = (edges[1:].clamp(max=right) - edges[:-1].clamp(min=left)).clamp(min=0)
    places = (((edges[1:] + edges[:-1]) / 2 - left) / (right - left)).clamp(0, 1)
    frequency = torch.arange(FREQUENCIES)[:, None]
    scale = torch.where(frequency == 0, 0.5**0.5, 1.0) / (right - left)
    return torch.cos(torch.pi * frequency * places) * covered * scale


def _whitening(thumbs: torch.Tensor) -> torch.Tensor:
    """The matrix (82, 82) that makes all directions equally strong over these images, fewer images less so.

    M^(-1/2) of the second moments M of all windows' descriptors: what is common to all images is one strong direction
    among them. The random sample is always the same.
    """
    generator = torch.Generator().manual_seed(0)
    sample = thumbs[torch.randperm(len(thumbs), generator=generator)[:WHITENING_SAMPLE]]
    vectors = torch.cat([_describe(part, WINDOWS, None).flatten(0, 1) for part in sample.split(256)]).double()
    size = vectors.shape[1]
    shrinkage = size / (size + len(sample))  # of few images, most directions are unknown
    moments = vectors.T @ vectors / max(len(vectors), 1)
    values, directions = torch.linalg.eigh(moments + (0.01 + shrinkage**2) / size * torch.eye(size).double())
    return (directions * values.rsqrt() @ directions.T).float()


# Verification


def _verify(wholes: torch.Tensor, others: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Correlation (P,) of each whole with the best fitting window of the other, found from the given one (P, 4).

    Correlation is that of the finest detail, which no two films share; -1 where not even the coarser detail fits.
    """
    small = [F.avg_pool2d(part.float()[:, None], 2)[:, 0] for part in (wholes, others)]
    whole, other = (_normalise_contrast(part, TO_PLACE) for part in small)
    windows, scores = _fit(whole, other, windows, COARSE_STEPS)
    near = (scores > WORTH_A_LOOK).nonzero().squeeze(1)
    checked = torch.full_like(scores, -1)
    if len(near):
        whole, other = (_normalise_contrast(part[near], TO_JUDGE) for part in (wholes, others))
        checked[near] = _fit(whole, other, windows[near], FINE_STEPS)[1]
    return checked


def _fit(
    wholes: torch.Tensor, others: torch.Tensor, windows: torch.Tensor, steps: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the edges of the windows, one by one, to where the correlation is largest: windows (P, 4), scores (P,)."""
    wholes = F.normalize((wholes - wholes.mean(dim=(1, 2), keepdim=True)).flatten(1), dim=1)
    scores = _correlation(wholes, others, windows)
    for step in steps:
        for edge in range(4):
            for move in (-step, step):
                moved = windows.clone()
                moved[:, edge] = (moved[:, edge] + move).clamp(-OVERHANG, 1 + OVERHANG)
                tried = _correlation(wholes, others, moved)
                better = tried > scores
                windows = torch.where(better[:, None], moved, windows)
                scores = torch.where(better, tried, scores)
    return windows, scores


def _correlation(wholes: torch.Tensor, others: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Pearson correlation (P,) of unit vectors (P, S S) with the windows (P, 4) of pictures (P, S, S), stretched."""
    left, right, top, bottom = windows.unbind(dim=1)
    size = others.shape[-1]
    seen = (_interpolation(top, bottom, size) @ others @ _interpolation(left, right, size).mT).flatten(1)
    return (wholes * F.normalize(seen - seen.mean(dim=1, keepdim=True), dim=1)).sum(dim=1)


def _interpolation(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """Matrices (P, S, S): lines of S pixels -> their parts from `start` to `end`, in 0 .. 1, at S pixels; linear."""
    pixels = torch.arange(size)
    places = start[:, None] * size + (pixels + 0.5) * (end - start)[:, None] - 0.5
    return (1 - (places[:, :, None] - pixels).abs()).clamp_(min=0)
