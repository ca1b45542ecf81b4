# Copyright 2026 The SPCXR on the Hub authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Custom handler for Hugging Face Inference Endpoints: `handler.py` in the model repository.

Request: the bytes of a PNG or JPEG; the same as a base64 string, with or without `data:image/png;base64,` before it; a
list of up to 16 of these; or `{"inputs": one of them, "parameters": {...}}`. Nothing is fetched: a URL is refused, and
no path is opened. Lungs must be dark and bones bright. 16-bit PNG keeps its depth.

Answer: a dictionary per picture (a list of them for a list), each with `"task"` and

    "notice": "research use only, not for clinical use"
    "intended_use": {"population": str, "ages": [years, years], "views": [str, ...]}, the images that the checkpoint was
    made for, or null. A PNG or JPEG does not say whose it is: compare before you send it.

embedding        "embedding": [D floats], "pooling": "mean" or "cls"
classification   "labels": [{"label": str, "score": float}, ...], the most probable first. Scores are probabilities, as
                 calibrated as the checkpoint is: over all labels they sum to 1, unless the model is multi-label.
                 "decisions": [{"target": str, "operating_point": str, "threshold": float, "score": float,
                 "positive": bool}, ...], one per target and operating point of `config.operating_points`. A target is a
                 label, or labels joined by " + ", whose probabilities are added; positive is a score at or above the
                 threshold. The list is empty where the checkpoint has no operating points.
                 "unlike_training": float in 0 .. 1, the share of the validation images that are more like the training
                 images than this picture, null where the checkpoint has no statistics of them; above 0.99 do not rely
                 on the scores.
segmentation     "width", "height" of the picture in pixels; "segments": [{"label": str, "share": float, "mask": str}]:
                 for each label its share of the picture's area, and a base64 PNG of the picture's size, 255 where the
                 label is and 0 elsewhere. Of a model with a heart and two lungs also "cardiothoracic_ratio", null where
                 one of them was not found.

Parameters, all optional: "top_k" (int, classification: number of labels), "operating_point" (str, classification: its
decisions alone).

What cannot be answered gives `{"error": "one line"}`, in a list in that picture's place, and never an exception.
"""

import base64
import binascii
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# Pillow comes through the library, as in the image processor.
from transformers.image_utils import PIL, is_pil_image

NOTICE = "research use only, not for clinical use"
MOST_PICTURES = 16
MOST_BYTES = 64 * 2**20
MOST_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG")
PARAMETERS = ("operating_point", "top_k")


class RequestError(ValueError):
    """A request that cannot be answered; the message is sent to the client."""


class EndpointHandler:
    """Loads the model of its repository once, and answers requests.

    Args:
        path: The folder with configuration, weights, image processor and code.
    """

    def __init__(self, path: str = ".") -> None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        name = (config.architectures or [""])[0]
        auto_class: Any
        if name.endswith("ForImageClassification"):
            self.task, auto_class = "classification", AutoModelForImageClassification
        elif name.endswith("ForSemanticSegmentation"):
            self.task, auto_class = "segmentation", AutoModelForSemanticSegmentation
        else:
            self.task, auto_class = "embedding", AutoModel
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = auto_class.from_pretrained(path, trust_remote_code=True, use_safetensors=True)
        self.model = model.to(self.device).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        statistics = Path(path) / "feature_statistics.safetensors"
        self.statistics = load_file(statistics) if statistics.is_file() else None

    def __call__(self, data: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer one request; the module says how both look."""
        try:
            inputs, parameters = split_request(data)
            if isinstance(inputs, (list, tuple)):
                return [self._answer_or_error(item, parameters) for item in check_batch(inputs)]
        except RequestError as error:
            return {"error": one_line(error)}
        return self._answer_or_error(inputs, parameters)

    def _answer_or_error(self, item: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.answer(read_picture(item), parameters)
        except Exception as error:  # whatever a decoder or the model says about it: the endpoint stays up
            return {"error": one_line(error)}

    @torch.no_grad()
    def answer(self, picture: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        """The answer about one picture (PIL)."""
        pixel_values = self.processor(picture, return_tensors="pt")["pixel_values"].to(self.device)
        if self.task == "classification":
            embeddings = self.model.spcxr(pixel_values=pixel_values).pooler_output
            found = self._classify(self.model.classifier(embeddings)[0].double().cpu(), parameters)
            unlike = None if self.statistics is None else self.model.unlike_training(embeddings, self.statistics).item()
            found["unlike_training"] = unlike
        elif self.task == "segmentation":
            found = self._segment(self.model(pixel_values=pixel_values), picture)
        else:
            embedding = self.model(pixel_values=pixel_values).pooler_output[0].float().tolist()
            found = {"embedding": embedding, "pooling": getattr(self.model.config, "pooling", None)}
        intended_use = getattr(self.model.config, "intended_use", None)
        return {"task": self.task, **found, "intended_use": intended_use, "notice": NOTICE}

    def _classify(self, logits: torch.Tensor, parameters: dict[str, Any]) -> dict[str, Any]:
        config = self.model.config
        if config.problem_type == "regression":
            scores = logits.tolist()
        elif config.problem_type == "multi_label_classification" or len(logits) == 1:  # as the pipeline does
            scores = logits.sigmoid().tolist()
        else:
            scores = logits.softmax(dim=0).tolist()
        by_label = {config.id2label[index]: score for index, score in enumerate(scores)}
        ranked = sorted(by_label.items(), key=lambda pair: -pair[1])[: top_k(parameters)]
        return {
            "labels": [{"label": label, "score": score} for label, score in ranked],
            "decisions": self._decide(by_label, parameters.get("operating_point")),
        }

    def _decide(self, by_label: dict[str, float], wanted: Any) -> list[dict[str, Any]]:
        points = getattr(self.model.config, "operating_points", None) or {}
        known = sorted({name for thresholds in points.values() for name in thresholds})
        if wanted is not None and wanted not in known:
            raise RequestError(f"operating_point must be one of {known}; got {wanted!r}")
        decisions = []
        for target, thresholds in points.items():
            # A label may hold a plus sign itself.
            labels = [target] if target in by_label else target.split(" + ")
            score = sum(by_label[label] for label in labels)
            decisions += [
                {
                    "target": target,
                    "operating_point": name,
                    "threshold": threshold,
                    "score": score,
                    "positive": score >= threshold,
                }
                for name, threshold in thresholds.items()
                if wanted in (None, name)
            ]
        return decisions

    def _segment(self, outputs: Any, picture: Any) -> dict[str, Any]:
        size, config = (picture.height, picture.width), self.model.config
        if config.problem_type == "multi_label_classification":  # labels that may overlap
            masks = self.processor.post_process_overlapping_segmentation(outputs, [size])[0].cpu()
        else:
            labels = self.processor.post_process_semantic_segmentation(outputs, [size])[0].cpu()  # (H, W)
            masks = torch.stack([labels == index for index in range(config.num_labels)])
        by_name = {config.id2label[index]: mask for index, mask in enumerate(masks)}
        segments = [
            {"label": name, "share": mask.double().mean().item(), "mask": encode_mask(mask)}
            for name, mask in by_name.items()
        ]
        found = {"width": picture.width, "height": picture.height, "segments": segments}
        if {"heart", "left lung", "right lung"} <= set(by_name):
            found["cardiothoracic_ratio"] = self.processor.cardiothoracic_ratio(by_name)
        return found


# ---- requests --------------------------------------------------------------------------------------------------


def split_request(data: Any) -> tuple[Any, dict[str, Any]]:
    """The inputs and the parameters of a request.

    Raises:
        RequestError: there are no inputs, or the parameters are not those that the module names.
    """
    if not isinstance(data, dict):
        return data, {}
    if data.get("inputs") is None:
        raise RequestError('no "inputs" in the request: send the bytes of a PNG or JPEG, or these as a base64 string')
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict) or not set(parameters) <= set(PARAMETERS):
        raise RequestError(f'"parameters" may hold {", ".join(PARAMETERS)}; got {str(parameters)[:100]}')
    top_k(parameters)
    return data["inputs"], parameters


def check_batch(items: Any) -> Any:
    """A list of at least 1 and at most `MOST_PICTURES` pictures."""
    if not 1 <= len(items) <= MOST_PICTURES:
        raise RequestError(f"a list may hold 1 to {MOST_PICTURES} pictures; got {len(items)}")
    return items


def top_k(parameters: dict[str, Any]) -> int | None:
    """How many labels to give; None for all."""
    count = parameters.get("top_k")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise RequestError(f"top_k must be a whole number of at least 1; got {str(count)[:40]}")
    return count


def read_picture(item: Any) -> Any:
    """Bytes, a base64 string or a PIL image (as the endpoint makes it of an image/* request) -> PIL image, upright.

    Raises:
        RequestError: it is none of these, or no PNG or JPEG, or too large.
    """
    if is_pil_image(item):
        return upright(item)
    if isinstance(item, str):
        item = decode_base64(item)
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise RequestError(f"a picture is bytes or a base64 string; got {type(item).__name__}")
    content = bytes(item)
    if not 0 < len(content) <= MOST_BYTES:
        raise RequestError(f"a picture has 1 to {MOST_BYTES} bytes; got {len(content)}")
    if content[128:132] == b"DICM":
        raise RequestError(
            "this is a DICOM file, whose values need interpreting: convert it first with the package, "
            '`pip install "spcxr-hf[dicom]"`, then spcxr_hf.read_radiograph("chest.dcm").save("chest.png")'
        )
    return open_picture(content)


def open_picture(content: bytes) -> Any:
    """Decode a PNG or JPEG."""
    try:
        return upright(PIL.Image.open(BytesIO(content), formats=FORMATS))
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds; what they say names objects of this process
        raise RequestError(
            f"not a readable {' or '.join(FORMATS)} picture, or cut short ({type(error).__name__})"
        ) from error


def upright(picture: Any) -> Any:
    """A picture (PIL) of a size that is read, loaded and turned as its EXIF says."""
    if picture.width * picture.height > MOST_PIXELS:
        raise RequestError(f"{picture.width} x {picture.height} pixels; at most {MOST_PIXELS} are read")
    picture.load()
    return PIL.ImageOps.exif_transpose(picture)


def decode_base64(text: str) -> bytes:
    """The bytes behind a base64 string or a data URI of one."""
    if re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise RequestError("URLs are not fetched: send the picture itself, as bytes or as a base64 string")
    if len(text) > 2 * MOST_BYTES:
        raise RequestError(f"a picture has 1 to {MOST_BYTES} bytes; got a longer string")
    text = re.sub(r"^\s*data:[\w/+.-]*;base64,", "", text)
    try:
        return base64.b64decode(re.sub(r"\s+", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("a string must be the base64 form of a PNG or JPEG; this one is not base64") from error


def encode_mask(mask: torch.Tensor) -> str:
    """(H, W) booleans -> base64 of a grey PNG, 255 where true."""
    stream = BytesIO()
    PIL.Image.fromarray((mask.to(torch.uint8) * 255).numpy()).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def one_line(error: Exception) -> str:
    """What an error says, on one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]} ..."


__all__ = ["EndpointHandler"]
