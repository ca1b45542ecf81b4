"""A segmentation model that finds the lungs of a set's images, for whatever hides or outlines them.

load_segmenter -> Segmenter.find       decoded images (n, 1, S, S) -> lungs (n, S, S)
find_lungs -> Segmenter.find           the same, kept in a folder for the next start
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from .data import Decoded, fingerprint, write_aside
from .encoders import LOADING_ERRORS
from .errors import SpcxrError, one_line
from .precision import bf16_autocast


@dataclass(frozen=True)
class Segmenter:
    """A model with a label `lung`, on its device, its image processor, and the number of that label."""

    model: PreTrainedModel
    processor: Any
    lung: int

    @torch.no_grad()
    def find(self, images: torch.Tensor, batch_size: int = 32, bf16: bool = False) -> torch.Tensor:
        """The lungs of images (n, 1, S, S) uint8: (n, S, S) booleans on the CPU.

        Args:
            images: Whole radiographs, as `data.decode_images` gives them.
            batch_size: Images per forward pass.
            bf16: Run the model in bfloat16 autocast.
        """
        found = []
        for part in tqdm(images.split(batch_size), desc="lungs", unit="batch"):
            inputs = self.processor([Image.fromarray(image[0].numpy()) for image in part.cpu()], return_tensors="pt")
            with bf16_autocast(self.model.device, bf16):
                outputs = self.model(**inputs.to(self.model.device))
            sizes = [tuple(part.shape[-2:])] * len(part)
            labels = self.processor.post_process_semantic_segmentation(outputs, sizes)
            found += [(one == self.lung).cpu() for one in labels]
        return torch.stack(found)

    def digest(self) -> str:
        """Eight digits that name the weights and the size of the input."""
        digest = hashlib.sha256(str(self.processor.size).encode())
        for name, values in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + values.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:8]


def load_segmenter(source: str, device: torch.device | str = "cpu") -> Segmenter:
    """A segmentation model by its folder or Hub id.

    Raises:
        SpcxrError: it is none, has no image processor, or has no label `lung`.
    """
    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(source, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise SpcxrError(f"{source}: no segmentation model ({one_line(error)})") from error
    labels = dict(model.config.label2id or {})
    if "lung" not in labels:
        raise SpcxrError(f"{source}: its labels are {', '.join(labels)}; there is no 'lung' among them")
    return Segmenter(model.to(device).eval(), processor, labels["lung"])


def find_lungs(
    segmenter: Segmenter, decoded: Decoded, cache: str | os.PathLike | None = None, bf16: bool = False
) -> torch.Tensor:
    """The lungs of a decoded set: (n, S, S) booleans.

    Args:
        cache: A folder to keep them in, for the next start with the same rows and the same weights; 8 kB an image
            of 256 x 256.
        bf16: Run the model in bfloat16 autocast.
    """
    shape = (len(decoded.images), *decoded.images.shape[-2:])
    file = None
    if cache is not None:
        file = Path(cache) / f"{fingerprint(decoded.table)}-lungs-{segmenter.digest()}-{shape[-1]}.npy"
        if file.is_file():
            return torch.from_numpy(np.unpackbits(np.load(file), count=int(np.prod(shape))).reshape(shape).astype(bool))
    lungs = segmenter.find(decoded.images, bf16=bf16)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, lambda stream: np.save(stream, np.packbits(lungs.numpy())))
    return lungs
