"""Plausibility: fast tests for images that are probably not upright frontal chest radiographs.

quality_warnings -> header_warnings           what a DICOM header says
                 -> colourfulness, features   of the grey values
                 -> chest_score               a linear rule on 16 x 16 pixels

The rule is a logistic regression between radiographs (and their mirror images) and negatives for it: the
same radiographs as photographic negatives and lying on a side or upside down, and noise with the 1/f amplitude spectrum
of natural images (Field, "Relations between the statistics of natural images and the response properties of cortical
cells", 1987, section 3). It does not detect lateral views. Fitted, with its threshold, on a random half of the
development radiographs by

    python -m training_scripts.benchmarks.plausibility --data DATA --fit true --output false_alarms.json

which also measures, on the other half, how often a real radiograph is called implausible and how often a negative, a
turned radiograph or something else is found.
"""

import math
from collections import Counter
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

SIDE = 16  # the rule takes SIDE x SIDE pixels
MIN_SAMPLED_SIDE = 64  # pixels along the shorter side that are used, if there are as many

MIN_DEVIATION = 8.0  # grey levels (of 256) of the SIDE x SIDE pixels; no score for darker or flatter images
# A brightest grey level (of 256) up to here is that of 14 bits or less in a 16-bit file, not scaled to 0..65535.
MAX_NEARLY_BLACK = 64
MAX_EQUAL_SHARE = 0.9  # of the pixels that have one and the same grey level (of 256)
SCALE_THEM = "16-bit files that hold 10 to 14 bits must be scaled to 0..65535"
MIN_NEGATIVES = 0.05  # share of a set; single radiographs are called negatives by mistake
# Hasler & Süsstrunk, "Measuring colorfulness in natural images", 2003: 15 is slightly, 33 moderately colourful.
MAX_COLOURFULNESS = 25.0

# fmt: off
HUNDREDTHS = (  # of the weights: 16 rows, top to bottom, of 16 columns
    -11, -20, -31, -26, -24, -3, 13, 17, 15, 15, -4, -22, -31, -36, -16, -9,
    1, -4, 7, 9, -17, -15, 14, 16, 12, 6, -7, -13, 3, 2, 4, 2,
    3, -6, 9, 12, -14, -20, 6, 9, 7, 2, -17, -12, 4, 5, -3, -3,
    -2, 1, 7, 11, 2, -18, 9, 10, 15, 7, -21, -6, 9, 11, 3, 5,
    10, 8, 6, 14, -9, -28, 1, 15, 20, 1, -16, -5, 19, 7, 1, 9,
    6, 8, 5, 17, -9, -23, 2, 16, 9, 1, -19, -12, 12, 6, 13, 4,
    0, 9, -7, 7, -16, -27, -3, 11, 10, -3, -23, -10, 11, 2, 9, 6,
    0, 6, -5, -9, -16, -15, -4, 14, 17, 2, -12, -18, -6, -3, 1, 0,
    -1, -4, -11, -12, -6, -12, -4, 18, 16, -2, -11, -12, -13, -12, -11, -6,
    -5, -7, -2, -12, 0, 3, 0, 12, 5, -1, 4, -1, -8, -9, -2, -5,
    -10, -3, -3, -9, 9, 12, 9, 21, 15, 7, 9, 6, -5, -1, 0, -8,
    -1, -5, -2, -8, 0, 12, 11, 11, 16, 10, 14, 8, -10, -4, -5, -4,
    -10, -6, -2, -2, 6, 8, 9, 18, 19, 15, 6, 8, -8, 0, -10, -15,
    -21, -13, -4, 3, 4, 10, 4, 15, 16, 6, 10, 4, -2, -2, -14, -10,
    -16, -3, -1, 8, 11, 8, -2, 4, 5, -1, 6, 14, 15, 7, -9, -17,
    -32, 5, 15, 23, 22, 9, -6, 3, -3, -9, 10, 16, 20, 13, 1, -32,
)
WEIGHTS = np.array(HUNDREDTHS) / 100
INTERCEPT = -7.16
MIN_CHEST_SCORE = -3.62
# fmt: on


# Values that rule out a plain chest radiograph. Messages repeat only these: an attribute may hold any text.
MODALITIES = {  # DICOM PS3.3 C.7.3.1.1.1, those that make other images
    "BMD": "bone densitometry", "CT": "computed tomography", "ES": "endoscopy", "IO": "intra-oral radiography",
    "IVUS": "intravascular ultrasound", "MG": "mammography", "MR": "magnetic resonance", "NM": "nuclear medicine",
    "OCT": "optical coherence tomography", "OP": "ophthalmic photography", "OPT": "ophthalmic tomography",
    "PT": "positron emission tomography", "PX": "panoramic X-ray", "SM": "slide microscopy", "US": "ultrasound",
    "XC": "photography",
}  # fmt: skip
BODY_PARTS = {  # DICOM PS3.16 annex L, those that leave out most of the chest
    "ABDOMEN": "abdomen", "ANKLE": "ankle", "ARM": "arm", "BREAST": "breast", "CALCANEUS": "heel",
    "CSPINE": "cervical spine", "ELBOW": "elbow", "EXTREMITY": "limb", "FEMUR": "thigh", "FINGER": "finger",
    "FOOT": "foot", "FOREARM": "forearm", "HAND": "hand", "HEAD": "head", "HIP": "hip", "HUMERUS": "upper arm",
    "JAW": "jaw", "KNEE": "knee", "LEG": "leg", "LSPINE": "lumbar spine", "MANDIBLE": "jaw", "NECK": "neck",
    "PELVIS": "pelvis", "SCAPULA": "shoulder blade", "SHOULDER": "shoulder", "SKULL": "skull", "SSPINE": "sacrum",
    "TIBIA": "lower leg", "TOE": "toe", "WRIST": "wrist",
}  # fmt: skip
VIEWS = {  # DICOM PS3.3 C.8.11.5.1 and what is in use beside it
    "LAT": "lateral", "LATERAL": "lateral", "LL": "lateral", "RL": "lateral", "LLO": "oblique", "RLO": "oblique",
    "LLD": "lying on a side", "RLD": "lying on a side",
}  # fmt: skip


class HeaderKind(NamedTuple):
    """The kind of image by a DICOM header, unchanged; "" where it is missing."""

    modality: str = ""
    body_part: str = ""
    view: str = ""


UNSTATED = HeaderKind()


class ImplausibleWarning(UserWarning):
    """An image was read that is probably not an upright frontal chest radiograph with dark lungs."""


def quality_warnings(image: Image.Image, colour: float = 0.0, header: HeaderKind = UNSTATED) -> list[str]:
    """Reasons why an image may not be an upright frontal chest radiograph with dark lungs.

    Args:
        image: mode `L` or `I;16`, (width, height) as read.
        colour: its `colourfulness` before it became grey.
        header: its kind by the DICOM header.

    Returns:
        Short texts, the most basic first; [] for a plausible image.
    """
    found = header_warnings(header)
    grey = subsample(image)
    pixels, deviation = _standardise(_shrink(grey))
    counts = grey.histogram()
    most, count, (low, high) = max(counts), grey.width * grey.height, cast(tuple[int, int], grey.getextrema())
    odd = []
    if most == count:
        odd.append("a constant image: all its pixels are alike")
    elif most > MAX_EQUAL_SHARE * count:
        odd.append(f"nearly empty: {most / count:.0%} of its pixels are alike")
    elif high <= MAX_NEARLY_BLACK:
        odd.append(f"nearly black: its brightest grey level is {high} of 255; {SCALE_THEM}")
    elif deviation < MIN_DEVIATION:
        odd.append(f"nearly empty: its grey levels lie within {low} to {high} of 255 and hardly differ between regions")
    if colour > MAX_COLOURFULNESS:
        odd.append("a colour picture, not a radiograph")
    if not odd and chest_score(pixels) < MIN_CHEST_SCORE:
        negative = chest_score(-pixels) >= MIN_CHEST_SCORE
        odd.append(
            "probably a photographic negative: lungs must be dark and bones bright"
            if negative
            else "does not look like an upright frontal chest radiograph"
        )
    return found + odd


def count_doubtful(images: np.ndarray) -> Counter[str]:
    """How many images (n, S, S) uint8 of a set, S at least 16, are nearly black, constant, or probably negatives."""
    found: Counter[str] = Counter()
    edges = np.arange(SIDE) * images.shape[-1] // SIDE
    area = np.outer(*[np.diff(np.append(edges, images.shape[-1]))] * 2).ravel()
    for start in range(0, len(images), 256):
        part = images[start : start + 256]
        low, high = part.min(axis=(1, 2)), part.max(axis=(1, 2))
        dark, constant = (high <= MAX_NEARLY_BLACK) & (high > low), high == low
        small = np.add.reduceat(np.add.reduceat(part, edges, axis=1, dtype=np.int64), edges, axis=2)
        pixels = small.reshape(len(part), -1) / area
        pixels -= pixels.mean(axis=1, keepdims=True)
        deviation = pixels.std(axis=1)
        scores = pixels @ WEIGHTS / np.maximum(deviation, 1e-3)
        negative = (scores + INTERCEPT < MIN_CHEST_SCORE) & (INTERCEPT - scores >= MIN_CHEST_SCORE)
        negative &= ~dark & (deviation >= MIN_DEVIATION)
        found.update(dark=int(dark.sum()), constant=int(constant.sum()), negative=int(negative.sum()))
    return found


def set_warning(found: Counter[str], count: int) -> str | None:
    """The result of `count_doubtful` as one line; None for a plausible set."""
    texts = []
    if found["dark"]:
        texts.append(f"{found['dark']} of {count} images are nearly black ({SCALE_THEM})")
    if found["constant"]:
        texts.append(f"{found['constant']} of {count} images are constant")
    if found["negative"] > MIN_NEGATIVES * count:
        texts.append(
            f"{found['negative']} of {count} images are probably photographic negatives (lungs must be dark and bones "
            "bright)"
        )
    return "; ".join(texts) or None


def header_warnings(header: HeaderKind) -> list[str]:
    """Codes of the standard that are not those of a frontal chest radiograph, in words."""
    modality, body_part, view = (text.strip().upper() for text in header)
    found = []
    if modality in MODALITIES:
        found.append(f"not a plain radiograph by its header: modality {modality} ({MODALITIES[modality]})")
    if body_part in BODY_PARTS:
        found.append(f"not of the chest by its header: body part {body_part} ({BODY_PARTS[body_part]})")
    if view in VIEWS:
        found.append(f"not a frontal view by its header: view position {view} ({VIEWS[view]})")
    return found


def subsample(image: Image.Image) -> Image.Image:
    """Every n-th pixel, as mode `L`, with a shorter side of at least 128 pixels where there are so many."""
    step = max(1, min(image.size) // MIN_SAMPLED_SIDE)
    if image.mode == "L" and step == 1:
        return image
    if image.mode != "L":
        return Image.fromarray((np.asarray(image)[::step, ::step] // 257).astype(np.uint8))
    size = (-(-image.width // step), -(-image.height // step))
    start = (1 - step) / 2  # so that the first of every `step` pixels is taken
    return image.transform(size, Image.Transform.AFFINE, (step, 0, start, 0, step, start), Image.Resampling.NEAREST)


def _shrink(grey: Image.Image) -> np.ndarray:
    """Mode `L` -> (256,) float64: 16 x 16 pixels, box-averaged."""
    small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.frombuffer(small.tobytes(), np.uint8).astype(np.float64)


def _standardise(small: np.ndarray) -> tuple[np.ndarray, float]:
    """Values (256,) with mean 0 and standard deviation 1, and the deviation that they had."""
    centred = small - small.sum() / small.size  # NumPy's `mean` and `std` take longer than all the rest
    deviation = math.sqrt(float(np.dot(centred, centred)) / small.size)
    return centred / max(deviation, 1e-3), deviation


def features(grey: Image.Image) -> np.ndarray:
    """Mode `L` -> (256,) float64 with mean 0 and standard deviation 1: the input of `chest_score`."""
    return _standardise(_shrink(grey))[0]


def chest_score(pixels: np.ndarray) -> float:
    """Log-odds that `features` (256,) are those of an upright frontal chest radiograph."""
    return float(np.dot(pixels, WEIGHTS) + INTERCEPT)


def colourfulness(image: Image.Image) -> float:
    """Of a colour picture, by Hasler & Süsstrunk 2003: 0 is grey, above 33 plainly colourful."""
    step = max(1, min(image.size) // MIN_SAMPLED_SIDE)
    size = (max(1, image.width // step), max(1, image.height // step))
    small = image.resize(size, Image.Resampling.NEAREST).convert("RGB")
    red, green, blue = np.moveaxis(np.asarray(small).astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    deviation = np.hypot(red_green.std(), yellow_blue.std())
    return float(deviation + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))
