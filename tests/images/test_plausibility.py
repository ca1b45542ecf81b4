"""Is it a chest radiograph? What is odd is said, in a warning or, strictly, in an error; made-up chests pass."""

import warnings

import numpy as np
import pytest
from PIL import Image

from spcxr_hf.errors import SpcxrError
from spcxr_hf.images import plausibility
from spcxr_hf.images.plausibility import ImplausibleWarning, chest_score, colourfulness, features, quality_warnings
from spcxr_hf.images.reader import read_radiograph
from training_scripts.benchmarks import plausibility as script


def chest(height: int = 300, width: int = 300) -> np.ndarray:
    """A body with dark lungs between bright shoulders, mediastinum and abdomen, on a dark background; uint8."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width - 0.5
    grey = np.where(np.abs(x) < 0.30 + 0.18 * np.clip(y * 3, 0, 1), 120.0, 15.0)  # the shoulders slope
    lungs = (((np.abs(x) - 0.2) / 0.13) ** 2 + ((y - 0.42) / 0.3) ** 2) < 1
    grey[lungs] = 50
    grey[(np.abs(x) < 0.06) | (((x - 0.06) / 0.14) ** 2 + ((y - 0.6) / 0.14) ** 2 < 1)] = 180  # spine, heart
    grey[y > 0.72] += 60
    grey[np.abs(x) > 0.48] = 15
    return np.clip(grey, 0, 255).astype(np.uint8)


def photograph() -> Image.Image:
    """Sky, grass and a red house."""
    picture = np.zeros((200, 260, 3), np.uint8)
    picture[:110], picture[110:] = (90, 150, 235), (60, 160, 50)
    picture[70:150, 100:170] = (200, 40, 30)
    return Image.fromarray(picture)


@pytest.mark.parametrize("shape", [(300, 300), (1200, 1000), (256, 320), (64, 64)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_chest_passes_at_any_size_and_depth(shape, mirrored):
    grey = chest(*shape)[:, :: -1 if mirrored else 1]
    assert quality_warnings(Image.fromarray(np.ascontiguousarray(grey))) == []
    assert quality_warnings(Image.fromarray(grey.astype(np.uint16) * 257)) == []


CASES = {
    "constant": (Image.new("L", (64, 64), 90), "a constant image"),
    "constant 16 bits": (Image.fromarray(np.full((64, 64), 40000, np.uint16)), "a constant image"),
    "nearly empty": (Image.fromarray(np.pad(chest(60, 60), 140)), "nearly empty: 9[0-9]% of its pixels"),
    "12 bits in 16": (
        Image.fromarray(chest().astype(np.uint16) * 10),
        "nearly black: its brightest grey level is .*scaled",
    ),
    "flat": (Image.fromarray((chest() // 64 + 90).astype(np.uint8)), "nearly empty: its grey levels lie within"),
    "negative": (Image.fromarray(255 - chest()), "probably a photographic negative"),
    "on its side": (Image.fromarray(np.rot90(chest()).copy()), "does not look like|negative"),
    "gradient": (Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))), "does not look like"),
    "photograph": (photograph(), "a colour picture"),
}


@pytest.mark.parametrize("case", CASES)
def test_odd_images_are_named(tmp_path, case):
    picture, text = CASES[case]
    path = tmp_path / "odd.png"
    picture.save(path)
    with pytest.warns(ImplausibleWarning, match=rf"odd\.png: .*{text}") as caught:
        image = read_radiograph(path)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # whoever called the reader
    assert image.size == picture.size
    with pytest.raises(SpcxrError, match=rf"odd\.png: .*{text}"):
        read_radiograph(path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_radiograph(path, strict=None)


def test_a_chest_is_read_without_a_word(tmp_path):
    path = tmp_path / "chest.png"
    for mode in ("L", "RGB", "P"):
        Image.fromarray(chest()).convert(mode).save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_radiograph(path)
            read_radiograph(path, strict=True)


@pytest.mark.parametrize("size", [16, 20, 96])
def test_doubtful_images_of_a_set_are_counted(size):
    good = [np.asarray(Image.fromarray(chest(140, width)).resize((size, size))) for width in (130, 150, 170)]
    images = np.stack(
        good * 5 + [good[0] // 16, good[1] // 4] + [np.full_like(good[0], 9)] + [255 - one for one in good]
    )
    found = plausibility.count_doubtful(images)
    assert found == {"dark": 2, "constant": 1, "negative": 3}
    text = plausibility.set_warning(found, len(images))
    assert text.startswith("2 of 21 images are nearly black (16-bit files that hold 10 to 14 bits must be scaled")
    assert "1 of 21 images are constant; 3 of 21 images are probably photographic negatives" in text
    assert plausibility.set_warning(plausibility.count_doubtful(images[:15]), 15) is None


def test_colourfulness_is_that_of_the_paper():
    """By hand: half red, half blue: rg is 255 and 0, yb 127.5 and -255."""
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:10, :, 0], picture[10:, :, 2] = 255, 255
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    assert colourfulness(Image.fromarray(picture)) == pytest.approx(expected)
    assert colourfulness(Image.fromarray(chest()).convert("RGB")) == 0
    tinted = np.stack([chest() * 0.9, chest() * 0.95, chest()], -1).astype(np.uint8)  # a scanned blue film
    assert colourfulness(Image.fromarray(tinted)) < plausibility.MAX_COLOURFULNESS


def test_features_and_chest_score():
    pixels = features(Image.fromarray(chest()))
    assert pixels.shape == (256,)
    assert pixels.mean() == pytest.approx(0, abs=1e-12)
    assert pixels.std() == pytest.approx(1)
    brighter = features(Image.fromarray((chest() * 0.5 + 60).astype(np.uint8)))
    assert np.abs(brighter - pixels).max() < 0.1  # brightness and contrast do not matter
    assert chest_score(pixels) + chest_score(-pixels) == pytest.approx(2 * plausibility.INTERCEPT)


def test_the_script_measures_and_fits(tmp_path, monkeypatch):
    """On made-up chests: fitted on half of them, the rule passes the other half and finds their negatives."""
    pytest.importorskip("sklearn")
    for name in ("WEIGHTS", "INTERCEPT", "MIN_CHEST_SCORE"):
        monkeypatch.setattr(plausibility, name, getattr(plausibility, name))  # put back afterwards
    monkeypatch.setattr(script, "NOISE_IMAGES", 40)
    generator = np.random.default_rng(0)
    chests = [Image.fromarray(chest(140, int(width))) for width in generator.integers(130, 200, 20)]
    fitted = script.fit(chests, 0.0, generator)
    assert np.shape(fitted["hundredths"]) == (16, 16)
    assert fitted["min_chest_score"] == plausibility.MIN_CHEST_SCORE
    result = script.measure(chests, ["made"] * 20, generator)
    assert result["false_alarm_rate"] <= 0.05  # the threshold is rounded to hundredths
    assert result["negatives_flagged"] == 1
    assert result["turned_flagged"] > 0.5
