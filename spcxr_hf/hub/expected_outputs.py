"""Expected outputs of a checkpoint, stored beside its weights, to verify that it still computes the same.

`expected_outputs.json` holds, for a made picture, some of the pixel values and of each output of `AutoModel` and of
the checkpoint's own class: its shape, and up to 32 values spread evenly over it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.models.loading import forward, load_config, load_network, load_processor, own_class, to_pixel_values

RECORD = "expected_outputs.json"
VALUES = 32
# Of the largest value of an output. Float32 on another machine is 1e-6 off; weights after one more step are 1e-3 off.
TOLERANCE = 1e-4


def record_outputs(folder: Path) -> Path:
    """Write what the checkpoint in `folder` gives for the made picture to `folder/expected_outputs.json`."""
    path = folder / RECORD
    path.write_text(json.dumps(summarise(made_outputs(folder)), indent=1) + "\n", encoding="utf-8")
    return path


def check_outputs(folder: Path) -> float:
    """Load the checkpoint, from its folder alone, and compare its outputs with those stored with it.

    Returns:
        The largest difference, as a share of the largest value of its output.

    Raises:
        SpcxrError: it does not load, or not completely; there is no record; or an output is not the recorded one.
    """
    path = folder / RECORD
    if not path.is_file():
        raise SpcxrError(f"{path}: missing; training_scripts/prepare_checkpoint.py writes it")
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        found = summarise(made_outputs(folder))
        if expected.keys() != found.keys():
            raise SpcxrError(f"{path}: records {', '.join(expected)}; the checkpoint gives {', '.join(found)}")
        return max(_difference(path, name, expected[name], found[name]) for name in found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpcxrError(f"{path}: not a record of outputs ({' '.join(str(error).split())})") from error


def _difference(path: Path, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    if expected["shape"] != found["shape"]:
        raise SpcxrError(f"{path}: {name} has the shape {found['shape']}, recorded was {expected['shape']}")
    wanted, given = np.asarray(expected["values"]), np.asarray(found["values"])
    share = float(np.abs(wanted - given).max() / max(float(np.abs(wanted).max()), 1e-12))
    if not share <= TOLERANCE:  # NaN too
        raise SpcxrError(
            f"{path}: {name} is not what was recorded, off by {share:.2g} of its largest value "
            f"(at most {TOLERANCE:g}); the weights, the code or the processor have changed since"
        )
    return share


def made_picture(height: int, width: int) -> np.ndarray:
    """A grey picture (height, width) uint8 with slopes and texture, out of whole numbers: the same on every machine."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    return ((160 * y // height + 60 * x // width + (x * y * 7919) % 36) % 256).astype(np.uint8)


@torch.no_grad()
def made_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """The pixel values of the made picture, and every output of `AutoModel` and of the checkpoint's own class."""
    config = load_config(str(folder), any_family=False)
    classes = {"AutoModel": AutoModel, own_class(config).__name__: own_class(config)}
    models = {name: load_network(one, str(folder))[0].eval() for name, one in classes.items()}
    side = config.image_size
    picture = Image.fromarray(made_picture(side + side // 4, side + side // 3))
    values = to_pixel_values(load_processor(str(folder)), [picture])
    outputs = {"pixel_values": values}
    for name, model in models.items():
        tensors = {key: value for key, value in forward(model, values).items() if isinstance(value, torch.Tensor)}
        outputs |= {f"{name}/{key}": value.float() for key, value in tensors.items()}
    return outputs


def summarise(outputs: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list]]:
    """Shape, and up to 32 values spread evenly over it (first and last among them), of each tensor."""
    summary: dict[str, dict[str, list]] = {}
    for name, tensor in outputs.items():
        flat = tensor.flatten()
        places = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel())).long()
        summary[name] = {"shape": list(tensor.shape), "values": [float(f"{value:.7g}") for value in flat[places]]}
    return summary
