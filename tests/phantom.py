"""A drawn chest: what the pages of the tree show, and what their code blocks read, in place of anybody's radiograph.

python -m tests.phantom chest.png && spcxr demo chest.png --output training_scripts/benchmarks/results/demo.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def draw_chest(size: int = 512, seed: int = 0) -> Image.Image:
    """A frontal chest of ellipses: body, lungs, heart, spine, collar bones and ribs; grey, (size, size), 8 bits."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    grey = np.where(ellipse(x, y, 0, 0.12, 0.47, 0.62), 150.0, 8.0)
    grey[ellipse(x, y, 0, -0.42, 0.13, 0.25)] = 150
    lungs = np.zeros_like(grey, bool)
    for side in (-1, 1):
        lung = ellipse(x, y, side * 0.19, -0.02, 0.145 + 0.05 * (y + 0.1), 0.36)
        lungs |= lung & ~ellipse(x, y, side * 0.2, 0.36, 0.24, 0.16)  # above the diaphragm
        grey[ellipse(x, y, side * 0.4, -0.33, 0.1, 0.12)] += 25  # shoulders
    grey[lungs] = 52
    for side in (-1, 1):
        outward = side * x
        for rib in range(9):  # bright bands that fall outward, where there are lungs
            height = -0.33 + 0.072 * rib + 0.9 * (outward - 0.08) ** 2 - 0.12 * (0.2 - outward)
            grey += 16 * np.exp(-(((y - height) / 0.012) ** 2)) * ((outward > 0.03) & (outward < 0.36))
        collar = -0.37 - 0.15 * (outward - 0.05)
        grey += 35 * np.exp(-(((y - collar) / 0.014) ** 2)) * ((outward > 0.04) & (outward < 0.36))
    heart = ellipse(x, y, 0.06, 0.13, 0.15, 0.15) | ellipse(x, y, 0, -0.12, 0.06, 0.3)
    grey[heart] = np.maximum(grey[heart], 165)
    grey += 25 * np.exp(-((x / 0.03) ** 2))  # spine
    soft = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 130))
    noisy = np.asarray(soft) + generator.normal(0, 3, (size, size))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def ellipse(x: np.ndarray, y: np.ndarray, x0: float, y0: float, width: float | np.ndarray, height: float) -> np.ndarray:
    """Where x, y, from -0.5 to 0.5, lie inside it; half axes."""
    return ((x - x0) / width) ** 2 + ((y - y0) / height) ** 2 < 1


if __name__ == "__main__":
    draw_chest().save(Path(sys.argv[1]))
