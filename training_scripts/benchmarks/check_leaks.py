"""Measure leak detection on real radiographs: recall on seeded copies, leaks of the set, and false pairs.

    python -m training_scripts.benchmarks.check_leaks --data ../shared/data \
        --output training_scripts/benchmarks/results/leaks.json

Copies of random images (a crop, a re-encoded one, one of another brightness and contrast) are hidden among all images,
and all pairs are compared. The threshold is the largest that finds 98 % of each kind among the copies of one random
half of the images; what is reported is measured on the other half. Then the leaks between the images that pretraining
may see and those of any other split, and the patients that are on both sides. (`spcxr audit` checks a set of your own.)

    python -m training_scripts.benchmarks.check_leaks --data DATA --verify pretrain \\
        --exclude training_scripts/recipes/near_copies.txt

looks whether anything leaks, patient or picture, once those are left out; where something does, it is printed and the
exit status is 1. `pretrain` is from the images that pretraining may see to any val, test or shift split; else name a
split.
"""

from __future__ import annotations

import io
import itertools
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError
from spcxr_hf.data.sets import read_set, write_ids
from spcxr_hf.data.table import RadiographTable, open_image
from spcxr_hf.quality.duplicates import (
    SAME_IMAGE,
    LeakError,
    Pair,
    find_duplicates,
    find_patient_leaks,
    known_patients,
    read_thumbnails,
    refuse_leaks,
    thumbnail,
)
from spcxr_hf.training.arguments import parse_arguments, run_script

LOWEST = 0.6  # similarities from here on are kept, to choose a threshold among them
CHOSEN_RECALL = 0.98
HELD_OUT = ("val", "test", "shift")


@dataclass
class Arguments:
    """Measure the search for leaks on real radiographs."""

    data: str = field(metadata={"help": "Parquet shards with a column `pretrain` and columns of splits"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    copies: int = field(default=200, metadata={"help": "seeded copies of each kind in either half"})
    rows: int | None = field(default=None, metadata={"help": "only this many random images, for a trial"})
    seed: int = field(default=0, metadata={"help": "of the halves and the copies"})
    pairs: str | None = field(default=None, metadata={"help": "JSON file of all pairs of the set: ids and similarity"})
    copies_list: str | None = field(
        default=None, metadata={"help": "text file of the images that copy a held-out one, for --exclude"}
    )
    exclude: str | None = field(default=None, metadata={"help": "text file of ids to leave out, as training does"})
    verify: str | None = field(
        default=None,
        metadata={"help": "only look whether anything leaks: `pretrain` (to any val, test or shift split), or between "
                  "the sides of this column"},
    )  # fmt: skip
    known_pairs: str | None = field(
        default=None,
        metadata={"help": "with verify: a file that --pairs wrote, in place of comparing the images"},
    )
    sheet: str | None = field(default=None, metadata={"help": "PNG of found pairs to look at; never into the tree"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    if arguments.verify is not None:
        verify(arguments, arguments.verify)
    else:
        measure_search(arguments)


def measure_search(arguments: Arguments) -> None:
    """The measurements of the module's docstring."""
    generator = np.random.default_rng(arguments.seed)
    table = read_set(arguments.data, arguments.exclude)
    if arguments.rows:
        rows = np.sort(generator.choice(len(table), min(arguments.rows, len(table)), replace=False))
        table = RadiographTable(table.rows.take(rows), table.name)
    start = time.perf_counter()
    thumbnails, broken = read_thumbnails([table])
    decoded = time.perf_counter()
    halves = generator.permutation(len(table)) % 2
    sources, copies = seed_copies(table, halves, arguments.copies, generator)
    hidden = np.concatenate([thumbnails, *copies.values()])
    compared, used = time.perf_counter(), time.process_time()
    pairs = find_duplicates(hidden, threshold=LOWEST)
    cost = {
        "decode_seconds": round(decoded - start, 1),
        "compare_seconds": round(time.perf_counter() - compared, 1),
        "compare_processor_seconds": round(time.process_time() - used, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
    }
    found = Found(table, halves, sources, list(copies), pairs)
    result = {"radiographs": len(table), "unreadable": len(broken), "cost": cost, **summarise(found)}
    print(json.dumps(result, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.pairs:
        pairs_found = [describe(table, pair) for pair in found.real(None, LOWEST)]
        Path(arguments.pairs).write_text(json.dumps(pairs_found) + "\n", encoding="utf-8")
    if arguments.copies_list:
        names = [table.ids[row] for row in pretraining_copies(found)]
        what = f"pretraining images with a near copy (similarity > {SAME_IMAGE}) in a val, test or shift split"
        write_ids(arguments.copies_list, names, f"{len(names)} {what}")
    if arguments.sheet:
        draw(thumbnails, found, Path(arguments.sheet))


# Whether anything leaks


def verify(arguments: Arguments, column: str) -> None:
    """Check that nothing leaks between the sides of a column.

    Raises:
        LeakError: something does.
    """
    table = read_set(arguments.data, arguments.exclude)
    if column == "pretrain":
        column = "pretrain or held out"
        table = RadiographTable(table.rows.append_column(column, pa.array(pretraining_sides(table))), table.name)
    report = refuse_leaks(table, column, images=arguments.known_pairs is None)
    if arguments.known_pairs is not None:
        side_of = dict(zip(table.ids, table.column(column), strict=True))
        pairs = [pair for pair in read_pairs(Path(arguments.known_pairs)) if is_leak(*map(side_of.get, pair))]
        if pairs:
            raise LeakError(f"{table.name}: {column} leaks: {len(pairs)} nearly equal pair(s), as {pairs[0]}", report)
    found = {"rows": report.rows, "patients": len(report.patients), "image_pairs": 0}
    print(json.dumps(found | {"unknown_patients": report.unknown_patients, "unreadable": len(report.broken)}))


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The ids of those pairs of a file of `--pairs` that count as one image.

    Similarities are rounded there to three digits: one that may be above the threshold counts.

    Raises:
        SpcxrError: the file cannot be read, or holds something else.
    """
    try:
        pairs: Iterable = json.loads(path.read_text(encoding="utf-8"))
        return [(str(first), str(second)) for first, second, similarity in pairs if similarity >= round(SAME_IMAGE, 3)]
    except OSError as error:
        raise SpcxrError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise SpcxrError(f"{path}: not a list of [id, id, similarity] ({error})") from error


# Seeded leaks


def seed_copies(
    table: RadiographTable, halves: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows (c,) to copy, `count` of each half, and by kind the thumbnails (c, 64, 64) of their copies."""
    sources = np.concatenate([generator.permutation(np.flatnonzero(halves == half))[:count] for half in (0, 1)])
    copies: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for row in tqdm(sources.tolist(), desc="copies", unit="image"):
        image = open_image(table.rows["image"][row].as_py(), f"row {row}")
        for kind, change in KINDS.items():
            copies[kind].append(thumbnail(change(image, generator)))
    return sources, {kind: np.stack(images) for kind, images in copies.items()}


def crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """80 to 95 % of the width and, independently, of the height, anywhere in the picture."""
    return crop_to(image, generator, 0.80, 0.95)


def tight_crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """70 to 80 %: more than the search is made for."""
    return crop_to(image, generator, 0.70, 0.80)


def crop_to(image: Image.Image, generator: np.random.Generator, low: float, high: float) -> Image.Image:
    width, height = (round(float(generator.uniform(low, high)) * side) for side in image.size)
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def reencode(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Half to full size, JPEG of quality 20 to 60."""
    scale = float(generator.uniform(0.5, 1))
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=int(generator.integers(20, 61)))
    return Image.open(buffer).convert("L")


def shift_brightness(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Gamma 0.7 to 1.5, contrast 0.7 to 1.3, brightness -0.15 to 0.15 of the range, cut off at black and white."""
    grey = np.asarray(image, dtype=np.float64) / 255
    grey = (grey ** generator.uniform(0.7, 1.5) - 0.5) * generator.uniform(0.7, 1.3) + 0.5
    return Image.fromarray((255 * (grey + generator.uniform(-0.15, 0.15)).clip(0, 1)).round().astype(np.uint8))


def all_at_once(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A crop of 80 to 95 %, of another brightness, re-encoded."""
    return reencode(shift_brightness(crop(image, generator), generator), generator)


KINDS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "crop": crop,
    "reencoded": reencode,
    "brightness": shift_brightness,
    "all_at_once": all_at_once,
    "tight_crop": tight_crop,
}
HELD_TO = ("crop", "reencoded", "brightness")  # the threshold is chosen on these


# Figures


@dataclass
class Found:
    """What the search found among the images of the set, followed by the copies of `sources`, kind by kind."""

    table: RadiographTable
    halves: np.ndarray
    sources: np.ndarray
    kinds: Sequence[str]
    pairs: Sequence[Pair]

    def similarities(self, half: int) -> dict[str, np.ndarray]:
        """Of each copy with its source in a half, by kind; -1 where they were not paired."""
        known = {(pair.first, pair.second): pair.similarity for pair in self.pairs}
        count, copied = len(self.table), self.halves[self.sources] == half
        return {
            kind: np.array(
                [
                    known.get((int(source), count + number * len(self.sources) + place), -1.0)
                    for place, source in enumerate(self.sources)
                ]
            )[copied]
            for number, kind in enumerate(self.kinds)
        }

    def real(self, half: int | None, threshold: float) -> list[Pair]:
        """Pairs of images of the set itself, both in a half (None: anywhere)."""
        return [
            pair
            for pair in self.pairs
            if pair.second < len(self.table)
            and pair.similarity > threshold
            and (half is None or self.halves[pair.first] == self.halves[pair.second] == half)
        ]


def summarise(found: Found) -> dict[str, Any]:
    """The threshold, what it finds in the half that it was not chosen on, and the leaks of the set."""
    chosen = choose_threshold(found.similarities(0))
    grid = sorted({*np.arange(0.6, 0.96, 0.05).round(2).tolist(), chosen, SAME_IMAGE})
    return {
        "threshold": SAME_IMAGE,
        "threshold_chosen_on_first_half": chosen,
        "seeded_copies_of_each_kind": len(found.sources) // 2,
        "first_half": {f"{one:g}": measure(found, 0, one) for one in grid},
        "second_half": {f"{one:g}": measure(found, 1, one) for one in grid},
        "all_images": measure(found, None, SAME_IMAGE),
        "leaks": find_leaks(found),
    }


def choose_threshold(similarities: Mapping[str, np.ndarray]) -> float:
    """The largest, in steps of 0.01, that finds 98 % of each kind that the search is held to."""
    for threshold in np.arange(0.95, LOWEST, -0.01).round(2).tolist():
        if all((similarities[kind] > threshold).mean() >= CHOSEN_RECALL for kind in HELD_TO):
            return threshold
    return LOWEST


def measure(found: Found, half: int | None, threshold: float) -> dict[str, Any]:
    """Recall of each kind of copy; the pairs found among the images of the set, and how many there are of all."""
    count = len(found.table) if half is None else int((found.halves == half).sum())
    pairs, patients = found.real(half, threshold), known_patients(found.table)
    kinds = Counter(relation(patients[pair.first], patients[pair.second]) for pair in pairs)
    entry: dict[str, Any] = (
        {}
        if half is None
        else {"recall": {kind: round(float((s > threshold).mean()), 4) for kind, s in found.similarities(half).items()}}
    )
    compared = count * (count - 1) // 2
    return entry | {
        "pairs_compared": compared,
        "pairs_found": len(pairs),
        "found_per_million": round(1e6 * len(pairs) / max(compared, 1), 4),
        "patients_of_pairs": dict(sorted(kinds.items())),
    }


def relation(first: str | None, second: str | None) -> str:
    """Whether two images are of the same patient."""
    if first is None or second is None:
        return "unknown"
    return "same" if first == second else "different"


def find_leaks(found: Found) -> dict[str, Any]:
    """Between images that pretraining may see and images of any val, test or shift split; and within each split."""
    table, pairs = found.table, found.real(None, SAME_IMAGE)
    pretrain, held_out = pretraining_and_held_out(table)
    sides: dict[str, list[str | None]] = {"pretrain": pretraining_sides(table)}
    sides |= {name: table.column(name) for name in split_columns(table)}
    leaks: dict[str, Any] = {"images_both_for_pretraining_and_held_out": int((pretrain & held_out).sum())}
    for name, values in sides.items():
        crossing = [pair for pair in pairs if is_leak(values[pair.first], values[pair.second])]
        people = find_patient_leaks(known_patients(table), values, table.ids)
        leaks[name] = {
            "rows": dict(Counter(value for value in values if value is not None)),
            "patients": len(people),
            "image_pairs": len(crossing),
            "images": {side: len(rows) for side, rows in images_by_side(values, crossing).items()},
            "sources": count_sources(table, crossing),
            "examples": [describe(table, pair) for pair in crossing[:40]],
        }
    return leaks


def split_columns(table: RadiographTable) -> list[str]:
    return [name for name in table.rows.column_names if name.endswith("_split")]


def pretraining_and_held_out(table: RadiographTable) -> tuple[np.ndarray, np.ndarray]:
    """Which rows pretraining may see, and which are in any val, test or shift split: (n,) boolean each."""
    held_out = [[value in HELD_OUT for value in table.column(name)] for name in split_columns(table)]
    return np.array(table.column("pretrain"), dtype=bool), np.any(held_out, axis=0)


def pretraining_sides(table: RadiographTable) -> list[str | None]:
    """(n,) `pretrain`, `held out`, or None for an image that is neither; one that is both counts as `pretrain`."""
    sides = zip(*pretraining_and_held_out(table), strict=True)
    return ["pretrain" if pretrain else "held out" if held_out else None for pretrain, held_out in sides]


def pretraining_copies(found: Found) -> set[int]:
    """The rows that pretraining may see and that copy a row which it must not see."""
    pretrain, held_out = pretraining_and_held_out(found.table)
    ends = [
        ends for pair in found.real(None, SAME_IMAGE) for ends in ((pair.first, pair.second), (pair.second, pair.first))
    ]
    return {first for first, second in ends if pretrain[first] and held_out[second]}


def is_leak(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and first != second


def images_by_side(sides: Sequence[str | None], pairs: Sequence[Pair]) -> dict[str, set[int]]:
    """The images of each side that are in a pair."""
    rows: dict[str, set[int]] = {}
    for row in (row for pair in pairs for row in (pair.first, pair.second)):
        rows.setdefault(str(sides[row]), set()).add(row)
    return dict(sorted(rows.items()))


def count_sources(table: RadiographTable, pairs: Sequence[Pair]) -> dict[str, int]:
    """How many pairs are within a source, or between two."""
    sources = table.column("source")
    between = Counter(" and ".join(sorted({sources[pair.first], sources[pair.second]})) for pair in pairs)
    return dict(between.most_common())


def describe(table: RadiographTable, pair: Pair) -> list:
    return [table.ids[pair.first], table.ids[pair.second], round(pair.similarity, 3)]


# Pictures


def draw(thumbnails: np.ndarray, found: Found, path: Path) -> None:
    """Found pairs side by side, from the least alike on, twelve to a row."""
    pairs = sorted(found.real(None, LOWEST), key=lambda pair: pair.similarity)
    above = [pair for pair in pairs if pair.similarity > SAME_IMAGE]
    shown = [pair for pair in pairs if pair.similarity <= SAME_IMAGE][-48:] + above[:48]
    tiles = [np.concatenate([thumbnails[pair.first], thumbnails[pair.second]], axis=1) for pair in shown]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 12) if tiles else []
    if tiles:
        rows = [np.concatenate(row, axis=1) for row in itertools.zip_longest(*[iter(tiles)] * 12)]
        Image.fromarray(np.concatenate(rows)).save(path)
    print(json.dumps([describe(found.table, pair) for pair in shown]))  # in the order of the picture


if __name__ == "__main__":
    run_script(main)
