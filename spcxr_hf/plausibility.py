"""Is this an upright frontal chest radiograph, lungs dark? A cheap test that warns of what is probably something else.

concerns -> _emptiness, colourfulness    of the grey values
         -> thumbnail, evidence          a linear rule on 16 x 16 pixels

The rule is a logistic regression between radiographs (and their mirror images) and what they must be told from: the
same radiographs as photographic negatives and lying on a side or upside down, and noise with the 1/f amplitude spectrum
of natural images (Field, "Relations between the statistics of natural images and the response properties of cortical
cells", 1987, section 3). A lateral view is not told from something else. Fitted, with its threshold, on a random half
of the development radiographs by

    python training_scripts/false_alarms.py --data DATA --fit true --output false_alarms.json

which also measures, on the other half, how often a real radiograph is called implausible and how often a negative, a
turned radiograph or something else is found.
"""

import numpy as np
from PIL import Image

SIDE = 16  # pixels of the thumbnail, each way
FEWEST_PIXELS = 128  # along the shorter side that are looked at, where there are so many

LEAST_DEVIATION = 8.0  # grey levels (of 256) of the thumbnail; darker or flatter images have nothing to judge
LARGEST_SHARE = 0.9  # of the pixels that have one and the same grey level (of 256)
# Hasler & Süsstrunk, "Measuring colorfulness in natural images", 2003: 15 is slightly, 33 moderately colourful.
LARGEST_COLOURFULNESS = 25.0

# fmt: off
HUNDREDTHS = (  # of the weights: 16 rows, top to bottom, of 16 columns
    -12, -23, -30, -25, -25, -4, 13, 17, 15, 15, -4, -23, -31, -36, -20, -11,
    4, -2, 9, 9, -16, -15, 14, 15, 12, 6, -6, -13, 4, 5, 6, 6,
    1, -6, 8, 13, -12, -21, 6, 10, 8, 2, -17, -12, 5, 5, -3, -5,
    -2, 2, 8, 9, 1, -18, 8, 10, 15, 7, -22, -7, 7, 11, 4, 5,
    10, 9, 6, 13, -8, -28, 1, 15, 21, 0, -16, -4, 19, 8, 1, 8,
    6, 7, 5, 18, -9, -24, 3, 15, 10, 1, -20, -13, 12, 7, 12, 3,
    0, 9, -6, 6, -15, -26, -2, 12, 12, -2, -22, -10, 10, 2, 8, 5,
    0, 5, -4, -9, -16, -15, -4, 14, 18, 1, -11, -18, -6, -2, 1, 0,
    -2, -5, -11, -12, -7, -13, -4, 17, 16, -2, -11, -12, -14, -12, -12, -7,
    -5, -6, -2, -13, 1, 3, 1, 12, 6, -1, 5, 0, -8, -9, -2, -5,
    -9, -4, -3, -9, 8, 13, 9, 21, 15, 6, 9, 6, -6, -1, 0, -6,
    -1, -5, -2, -8, 0, 12, 11, 11, 16, 10, 15, 8, -11, -4, -5, -4,
    -10, -6, -2, -1, 7, 8, 9, 18, 18, 14, 6, 10, -8, 0, -10, -17,
    -21, -12, -3, 2, 4, 10, 4, 13, 15, 6, 10, 4, -4, -1, -14, -9,
    -16, -2, -1, 7, 11, 8, -2, 3, 6, -1, 5, 14, 14, 8, -9, -19,
    -32, 5, 16, 22, 22, 8, -6, 3, -2, -8, 9, 14, 19, 15, 2, -32,
)
WEIGHTS = np.array(HUNDREDTHS) / 100
INTERCEPT = -7.18
LEAST_EVIDENCE = -3.8
# fmt: on


class ImplausibleWarning(UserWarning):
    """An image was read that is probably not an upright frontal chest radiograph with dark lungs."""


def concerns(image: Image.Image, colour: float = 0.0) -> list[str]:
    """What speaks against an image being an upright frontal chest radiograph with dark lungs.

    Args:
        image: mode `L` or `I;16`, (width, height) as read.
        colour: its `colourfulness` before it became grey.

    Returns:
        Nothing, or short texts, the most basic first.
    """
    grey = subsample(image)
    small = _shrink(grey)
    found = _emptiness(grey, small)
    if colour > LARGEST_COLOURFULNESS:
        found.append("a colour picture, not a radiograph")
    if found:
        return found
    pixels = _standardise(small)
    if evidence(pixels) >= LEAST_EVIDENCE:
        return []
    if evidence(-pixels) >= LEAST_EVIDENCE:
        return ["probably a photographic negative: lungs must be dark and bones bright"]
    return ["does not look like an upright frontal chest radiograph"]


def subsample(image: Image.Image) -> Image.Image:
    """Every n-th pixel, as mode `L`, with a shorter side of at least 128 pixels where there are so many."""
    step = max(1, min(image.size) // FEWEST_PIXELS)
    if image.mode == "L" and step == 1:
        return image
    values = np.asarray(image)[::step, ::step]
    return Image.fromarray(np.ascontiguousarray(values if image.mode == "L" else (values // 257).astype(np.uint8)))


def _emptiness(grey: Image.Image, small: np.ndarray) -> list[str]:
    counts = grey.histogram()
    levels = [level for level, count in enumerate(counts) if count]
    low, high = levels[0], levels[-1]
    if low == high:
        return ["a constant image: all its pixels are alike"]
    share = max(counts) / (grey.width * grey.height)
    if share > LARGEST_SHARE:
        return [f"nearly empty: {share:.0%} of its pixels are alike"]
    if small.std() < LEAST_DEVIATION:
        return [f"nearly empty: its grey levels lie within {low} to {high} of 255 and hardly differ between regions"]
    return []


def _shrink(grey: Image.Image) -> np.ndarray:
    """Mode `L` -> (256,) float64: 16 x 16 pixels, box-averaged."""
    return np.array(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64).reshape(-1)


def _standardise(small: np.ndarray) -> np.ndarray:
    return (small - small.mean()) / max(float(small.std()), 1e-3)


def thumbnail(grey: Image.Image) -> np.ndarray:
    """Mode `L` -> (256,) float64 with mean 0 and standard deviation 1, the form that `evidence` takes."""
    return _standardise(_shrink(grey))


def evidence(pixels: np.ndarray) -> float:
    """How much a thumbnail (256,) looks like an upright frontal chest radiograph: a log-odds, larger is more."""
    return float(np.dot(pixels, WEIGHTS) + INTERCEPT)


def colourfulness(image: Image.Image) -> float:
    """Of a colour picture, by Hasler & Süsstrunk 2003: 0 is grey, above 33 plainly colourful."""
    step = max(1, min(image.size) // FEWEST_PIXELS)
    size = (max(1, image.width // step), max(1, image.height // step))
    small = image.resize(size, Image.Resampling.NEAREST).convert("RGB")
    red, green, blue = np.moveaxis(np.asarray(small).astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    deviation = np.hypot(red_green.std(), yellow_blue.std())
    return float(deviation + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))
