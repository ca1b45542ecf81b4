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

"""Image processor: pictures of chest radiographs -> `pixel_values`.

Steps: tensor of the picture's own type -> floats in 0..1 (the range follows from the type) -> grey -> resized without
cropping -> normalised. The first three are shared; the back ends, torchvision and Pillow, differ in how they resize.

`preprocessor_config.json` always holds

    "auto_map": {"AutoImageProcessor": {"pil": "image_processing_spcxr.SpcxrImageProcessorPil",
                                        "torchvision": "image_processing_spcxr.SpcxrImageProcessor"}}

so that with `trust_remote_code=True`, and this file beside it, `AutoImageProcessor` finds the class of the back end
that is installed or asked for.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

# Pillow comes through the library: it imports it where it is installed, and this file needs only its `fromarray`.
from transformers.image_utils import (
    PIL,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_pil_image,
    is_valid_image,
    to_numpy_array,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging, requires_backends

logger = logging.get_logger(__name__)

# Grey level of chest radiographs on the scale 0..1.
RADIOGRAPH_MEAN = [0.5136]
RADIOGRAPH_STD = [0.2479]

AUTO_MAP = {
    "AutoImageProcessor": {
        "pil": "image_processing_spcxr.SpcxrImageProcessorPil",
        "torchvision": "image_processing_spcxr.SpcxrImageProcessor",
    }
}

# Pillow mode -> mode whose array is read. Alpha is dropped and a palette looked up, as `Image.convert` does it.
IMAGE_MODES = {mode: mode for mode in ("1", "L", "RGB", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")}
IMAGE_MODES |= {"LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB"}
# The labels of a label map are the indices of its palette.
LABEL_MODES = {mode: mode for mode in ("1", "L", "P", "I;16", "I;16L", "I;16B", "I;16N", "I")}

CHANNELS = (1, 3, 4)
LUMINANCE_RED, LUMINANCE_BLUE = 0.299, 0.114  # ITU-R BT.601, as Pillow's convert("L"); green has the rest
FLOAT_TOLERANCE = 1e-3  # what resampling and rounding may leave outside 0..1
LARGEST_LABEL = 2**24  # labels are resized as float32, which holds whole numbers up to here
# Of an image, as `spcxr_hf.read_radiograph` has them; more would fill the memory when it is resized.
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 50_000_000, 32_768, 50
# Shares of pixels at the ends of the range, and at its upper end, of a picture that may have lost its greys. A tenth of
# a radiograph at most is white, and at least half of one of 10 to 16 bits that is cut off at 255.
MAX_BLACK_AND_WHITE, MAX_WHITE = 0.95, 0.4


class SpcxrImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    num_output_channels (`int`, *optional*, defaults to `self.num_output_channels`):
        1, or 3 to repeat the grey channel for a model that expects RGB.
    value_range (`tuple[float, float]`, *optional*):
        The values that are black and white. Left out, the type says: integers fill its range, floats lie in 0..1.
    overlapping_labels (`bool`, *optional*):
        Whether the model's labels may overlap, as structures of an anatomy do: each has a sigmoid of its own.
    """

    num_output_channels: int | None
    overlapping_labels: bool | None
    value_range: tuple[int | float, int | float] | list[int | float] | None


def _single_images(images: Any, ndim: int) -> list[Any]:
    """Flatten lists and batch arrays into single pictures; an array of up to `ndim` dimensions is one picture."""
    if isinstance(images, (list, tuple)):
        singles = [single for item in images for single in _single_images(item, ndim)]
    elif isinstance(images, (str, bytes, os.PathLike)):
        raise ValueError(
            "the image processor takes pictures, not paths or encoded bytes: read the file first, with "
            "spcxr_hf.read_radiograph (PNG, JPEG, TIFF, WebP, BMP, DICOM) or PIL.Image.open"
        )
    elif not is_valid_image(images):
        raise ValueError(
            f"an image must be a PIL.Image.Image, a NumPy array or a torch tensor; got {type(images).__name__}"
        )
    elif is_pil_image(images) or images.ndim <= ndim:
        singles = [images]
    elif images.ndim == ndim + 1:
        singles = list(images)
    else:
        raise ValueError(f"an array has at most {ndim + 1} dimensions; got the shape {tuple(images.shape)}")
    if not singles:
        raise ValueError("no images given: the list or batch is empty")
    return singles


def _check_size(height: int, width: int) -> None:
    short, long = sorted((height, width))
    if short * long > MAX_PIXELS or long > MAX_SIDE or long > MAX_ASPECT * short > 0:
        raise ValueError(
            f"an image of {height} x {width} pixels is too large or too long: at most {MAX_PIXELS:,} pixels, "
            f"{MAX_SIDE:,} along a side, and {MAX_ASPECT} times as long as wide"
        )


def _to_tensor(image: Any, modes: dict[str, str]) -> torch.Tensor:
    """The picture's values in their own type, in the layout they came in."""
    if isinstance(image, torch.Tensor):
        return image
    if is_pil_image(image):
        if image.mode not in modes:
            raise ValueError(f"PIL mode {image.mode!r} is not accepted; convert to one of {', '.join(modes)}")
        _check_size(image.height, image.width)  # before Pillow decodes it
        image = image if modes[image.mode] == image.mode else image.convert(modes[image.mode])
    array = to_numpy_array(image)
    kind, bytes_per_value = array.dtype.kind, array.dtype.itemsize
    if kind not in "biuf":
        raise ValueError(f"arrays of type {array.dtype} are not accepted; give bool, integer or float values")
    if kind == "f" and bytes_per_value > 8:
        dtype = "float64"  # torch has no long double ...
    elif kind == "u" and bytes_per_value > 2:
        dtype = "int64"  # ... and hardly an operation on wide unsigned integers
    else:
        dtype = array.dtype.newbyteorder("=")
    return torch.from_numpy(array.astype(dtype, order="C"))  # a copy: read-only and mirrored arrays are welcome


def _channels_first(image: torch.Tensor, data_format: str | ChannelDimension | None) -> torch.Tensor:
    """(H, W), (C, H, W) or (H, W, C) -> (C, H, W) with 1, 3 or 4 channels, of bounded size.

    Arrays (3, H, W) and (4, H, W) can be stacks of grey images, too: four are refused, and three that differ are read
    as one RGB picture with a warning, since torch's RGB tensors have that shape.
    """
    shape = tuple(image.shape)
    if image.ndim not in (2, 3):
        raise ValueError(f"an image has the shape (H, W), (C, H, W) or (H, W, C); got {shape}")
    if image.numel() == 0:
        raise ValueError(f"an image of shape {shape} holds no pixels")
    if image.ndim == 2:
        _check_size(*shape)
        return image.unsqueeze(0)
    first, last = shape[0] in CHANNELS, shape[-1] in CHANNELS
    if data_format is not None:
        last = last and ChannelDimension(data_format) == ChannelDimension.LAST
        first = first and ChannelDimension(data_format) == ChannelDimension.FIRST
    if first and last:
        raise ValueError(
            f"shape {shape} can be read as (C, H, W) and as (H, W, C); "
            'say which by input_data_format="channels_first" or "channels_last"'
        )
    if not (first or last):
        layout = "" if data_format is None else f" as {ChannelDimension(data_format).value}"
        raise ValueError(
            f"an image has 1, 3 or 4 channels; got the shape {shape}{layout} (a batch of grey images is (N, 1, H, W))"
        )
    image = image if first else image.movedim(-1, 0)
    _check_size(image.shape[1], image.shape[2])
    if first and data_format is None and len(image) == 4:
        raise ValueError(
            f"shape {shape} can be one RGBA picture or four grey ones: give grey images as (4, 1, H, W), and RGBA as "
            '(H, W, 4) or with input_data_format="channels_first"'
        )
    if first and data_format is None and len(image) == 3 and not all(torch.equal(image[0], one) for one in image[1:]):
        logger.warning_once(
            "An array (3, H, W) is read as one RGB picture, of which the luminance is used; three grey images are "
            "(3, 1, H, W)."
        )
    return image


def _check_unit(image: torch.Tensor, advice: str) -> torch.Tensor:
    """Floats that lie in 0..1, as float32; a rounding error beyond is cut off."""
    image = image.to(torch.float32)
    low, high = (bound.item() for bound in image.detach().aminmax())  # NaN anywhere makes both NaN
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError("the image holds NaN or infinite values")
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ValueError(f"the image's values go from {low:.6g} to {high:.6g}, outside 0..1: {advice}")
    return image.clamp(0, 1)


def _integers_to_unit(image: torch.Tensor) -> torch.Tensor:
    """uint8 / 255; every other integer type / 65535. The type decides, never the values."""
    if image.dtype == torch.uint8:
        return image.to(torch.float32) / 255
    name = str(image.dtype).removeprefix("torch.")
    values = image.to(torch.float32)  # a copy; exact where it matters, up to 65535
    low, high = (int(bound.item()) for bound in (values if image.dtype == torch.uint16 else image).aminmax())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} values from {low} to {high}: integer images must lie in 0..65535")
    if image.dtype != torch.uint16 and 0 < high < 256:
        raise ValueError(
            f"{name} values from {low} to {high} can be 8 or 16 bit: give uint8 (0..255) or uint16 (0..65535)"
        )
    if 0 < high < 16384:
        logger.warning_once(
            "A 16-bit image whose largest value is below 16384 comes out nearly black: 16 bits are divided by 65535. "
            "If it holds 12 bits, pass rescale_factor=1/4095; if 14, 1/16383."
        )
    return values.div_(65535)


def _stated_range_to_unit(image: torch.Tensor, value_range: Any) -> torch.Tensor:
    """Values of a range that the caller states -> float32 in 0..1."""
    low, high = (float(bound) for bound in value_range)
    if not (high > low and abs(low) < float("inf") and high < float("inf")):
        raise ValueError(f"value_range holds the values that are black and white, the lower first; got {value_range}")
    return _check_unit((image.to(torch.float64) - low) / (high - low), f"check value_range=({low:.6g}, {high:.6g})")


def _to_unit(
    image: torch.Tensor, do_rescale: bool | None, rescale_factor: float | None, value_range: Any = None
) -> torch.Tensor:
    """Values of any accepted type -> float32 in 0..1."""
    if image.dtype == torch.bool:
        return image.to(torch.float32)
    if image.is_complex():
        raise ValueError("complex images are not accepted")
    if value_range is not None:
        return _stated_range_to_unit(image, value_range)
    if image.is_floating_point():
        advice = (
            "pass 8 or 16 bits as uint8 or uint16, divide them by 255 or 65535, or state value_range=(black, white); "
            "do not normalise beforehand"
        )
        return _check_unit(image, advice)
    if not do_rescale:
        raise ValueError(f"do_rescale=False needs a float image in 0..1; got {image.dtype}")
    if rescale_factor is not None:
        return _check_unit(image.to(torch.float64) * rescale_factor, f"check rescale_factor={rescale_factor:.6g}")
    return _integers_to_unit(image)


def _to_grey(image: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (1, H, W): luminance of RGB, alpha dropped."""
    if image.shape[0] == 1:
        return image
    red, green, blue = image[:3].split(1)
    # Written around green, so that three equal channels give exactly that channel.
    return green + LUMINANCE_RED * (red - green) + LUMINANCE_BLUE * (blue - green)


def _radiograph(
    image: Any,
    do_rescale: bool | None = True,
    rescale_factor: float | None = None,
    num_output_channels: int = 1,
    input_data_format: str | ChannelDimension | None = None,
    device: "str | torch.device | None" = None,
    value_range: tuple[float, float] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """One picture of any accepted kind -> (num_output_channels, H, W) float32 in 0..1, grey."""
    layout = ChannelDimension.LAST if is_pil_image(image) else input_data_format
    values = _channels_first(_to_tensor(image, IMAGE_MODES), layout)
    values = values if device is None else values.to(device)
    grey = _to_grey(_to_unit(values, do_rescale, rescale_factor, value_range))
    sample = grey[:, :: max(1, grey.shape[1] // 128), :: max(1, grey.shape[2] // 128)]
    low, high = (bound.item() for bound in sample.aminmax())
    black, white = (end.float().mean().item() for end in (sample <= 0, sample >= 1))
    if low == high or white > MAX_WHITE or (high >= 1 and black + white > MAX_BLACK_AND_WHITE):
        logger.warning_once(
            "An image is constant, largely white, or black and white without greys: no radiograph. The pipelines of "
            "transformers make such pictures of 16-bit and DICOM files whose path they are given: read the file with "
            "spcxr_hf.read_radiograph, and give them the image that it returns."
        )
    return grey.expand(num_output_channels, -1, -1).contiguous()


def _two_colours(picture: Any) -> torch.Tensor:
    """A mask in colour, black outside and one other colour inside -> (H, W) bool."""
    _check_size(picture.height, picture.width)
    pixels = torch.from_numpy(to_numpy_array(picture).copy())
    colours = picture.convert("RGB").getcolors(maxcolors=2)
    if colours is None or (pixels.shape[-1] == 4 and pixels[..., 3].min() < 255):
        raise ValueError("a segmentation map in colour holds two colours, black and another, and is opaque")
    if len(colours) == 2 and (0, 0, 0) not in [colour for _, colour in colours]:
        raise ValueError("a segmentation map of two colours needs black outside; which is inside is not known")
    return pixels[..., :3].bool().any(dim=-1)


def _label_map(labels: Any) -> torch.Tensor:
    """A label map of any accepted kind -> (1, H, W) float32 that holds whole numbers.

    One that holds 255, and beside it at most 0, is a mask of two classes: 255 becomes 1. Beside other labels 255 stays
    what it is, the label of pixels to ignore.
    """
    if is_pil_image(labels) and labels.mode in ("RGB", "RGBA"):
        labels = _two_colours(labels)
    values = _to_tensor(labels, LABEL_MODES)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"a segmentation map has the shape (H, W) and is not empty; got {tuple(values.shape)}")
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"a segmentation map holds integer labels; got {values.dtype}")
    _check_size(*values.shape)
    if values.dtype not in (torch.bool, torch.uint8):
        values = values.to(torch.int64)
        if values.abs().max() > LARGEST_LABEL:
            raise ValueError(f"a segmentation map holds labels up to {LARGEST_LABEL}; got {values.abs().max().item()}")
    if values.dtype != torch.bool and values.max() == 255 and bool(((values == 0) | (values == 255)).all()):
        values = values // 255
    return values.unsqueeze(0).to(torch.float32)


def _logits_of_size(logits: torch.Tensor, target_sizes: Any) -> list[torch.Tensor]:
    """Each image's logits (num_labels, height, width) at its size; as they are without sizes."""
    if target_sizes is None:
        return list(logits)
    if len(target_sizes) != len(logits):
        raise ValueError(f"{len(target_sizes)} target_sizes for {len(logits)} images")
    return [
        nn.functional.interpolate(
            image.unsqueeze(0).float(), size=[int(side) for side in size], mode="bilinear", align_corners=False
        )[0]
        for image, size in zip(logits, target_sizes, strict=True)
    ]


def _per_channel(value: float | tuple[float, ...], channels: int, name: str) -> tuple[float, ...]:
    """One value per output channel; a single one serves all."""
    values = (float(value),) if isinstance(value, (int, float)) else tuple(value)
    if len(values) not in (1, channels):
        raise ValueError(f"{name} has {len(values)} values for {channels} output channel(s)")
    return values * channels if len(values) == 1 else values


class _RadiographProcessing(BaseImageProcessor):
    """Mixin with the steps that both back ends share; listed before the back end among the bases."""

    valid_kwargs = SpcxrImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = True
    size = {"height": 224, "width": 224}
    default_to_square = True
    resample = PILImageResampling.BILINEAR  # both back ends antialias it, and it never leaves the range of the image
    do_rescale = True
    rescale_factor = None  # the range of the type
    value_range = None  # likewise
    do_normalize = True
    image_mean = RADIOGRAPH_MEAN
    image_std = RADIOGRAPH_STD
    num_output_channels = 1
    overlapping_labels = None  # no: every pixel has one label

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SpcxrImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn pictures into a batch.

        Args:
            images: one picture or a (nested) list of pictures of any kinds and sizes, or a batch array (N, C, H, W) or
                (N, H, W, C). The class docstring lists the kinds.
            segmentation_maps: as many label maps: PIL images or integer or bool arrays (H, W), or an array (N, H, W).
                Resized by nearest neighbour; a palette is not looked up. Masks of 0 and 255, or of black and another
                colour, are of the classes 0 and 1; beside other labels 255 is the one that the loss ignores.
            kwargs: any attribute of the processor, for this call only; `input_data_format`, `device`, `return_tensors`.

        Returns:
            `pixel_values`: (B, num_output_channels, height, width) float32.
            `labels`: (B, height, width) int64, where `segmentation_maps` is given.
            Tensors with `return_tensors="pt"`, lists of single ones without.

        Raises:
            ValueError: a picture, a label map or an option cannot be interpreted; the text says what was given and what
                is accepted.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The most probable label of each pixel.

        Args:
            outputs: has `logits` (B, num_labels, H, W).
            target_sizes: (height, width) of each map, as a rule the size of the picture before processing; the logits'
                size where it is left out.

        Returns:
            B label maps (height, width), int64.

        Raises:
            ValueError: `target_sizes` does not have B entries, or the labels overlap.
        """
        if self.overlapping_labels:
            raise ValueError(
                "these labels overlap, which one map cannot show: use post_process_overlapping_segmentation, or "
                'pipeline("image-segmentation") without a subtask'
            )
        return [image.argmax(dim=0) for image in _logits_of_size(outputs.logits, target_sizes)]

    def post_process_overlapping_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        mask_threshold: float = 0.5,
    ) -> list[torch.Tensor]:
        """Where each label is, for a model with `problem_type="multi_label_classification"`.

        Args:
            outputs: has `logits` (B, num_labels, H, W).
            target_sizes: as for `post_process_semantic_segmentation`.
            mask_threshold: a probability above it is inside.

        Returns:
            B masks (num_labels, height, width), booleans.

        Raises:
            ValueError: `target_sizes` does not have B entries.
        """
        return [image.sigmoid() > mask_threshold for image in _logits_of_size(outputs.logits, target_sizes)]

    @property
    def post_process_instance_segmentation(self) -> Any:
        """What `pipeline("image-segmentation")` calls for labels that overlap; other models have no such attribute."""
        if not self.overlapping_labels:
            raise AttributeError("post_process_instance_segmentation is for overlapping_labels")
        return self._post_process_instances

    def _post_process_instances(
        self, outputs: Any, threshold: float = 0.9, mask_threshold: float = 0.5, target_sizes: Any = None, **_: Any
    ) -> list[dict[str, Any]]:
        """In the form of transformers' instance segmentation, but the `id` of a segment is a map (height, width): the
        segment is where `segmentation` equals it, since one number for each pixel cannot say that two overlap. `score`
        is the mean probability inside; a label whose score is below `threshold`, or that is nowhere, is left out.
        """
        found = []
        for image in _logits_of_size(outputs.logits, target_sizes):
            probabilities = image.sigmoid().cpu()
            masks = probabilities > mask_threshold
            segments = []
            for label, (mask, values) in enumerate(zip(masks, probabilities, strict=True)):
                score = values[mask].mean().item() if mask.any() else 0.0
                if score >= threshold:
                    segments.append({"id": mask.long() - 1, "label_id": label, "score": score})
            found.append({"segmentation": torch.zeros_like(masks[0], dtype=torch.long), "segments_info": segments})
        return found

    @staticmethod
    def cardiothoracic_widths(masks: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]] | None:
        """The widths of the heart and of the lungs together, from the masks of a frontal radiograph.

        Args:
            masks: label -> (height, width) booleans, "heart", "left lung" and "right lung" among them.

        Returns:
            "heart" and "lungs": first and last column, both inside. The cardiothoracic ratio is the width of the one
            divided by that of the other. Columns with less than 2 % of the height inside a structure are passed over:
            they hold specks rather than an edge. None where a structure is missing.
        """
        if not {"heart", "left lung", "right lung"} <= set(masks):
            return None
        widths = {}
        for name, parts in {"heart": ("heart",), "lungs": ("left lung", "right lung")}.items():
            inside = [masks[part].sum(dim=0) >= max(1.0, 0.02 * len(masks[part])) for part in parts]
            if not all(columns.any() for columns in inside):
                return None
            columns = torch.stack(inside).any(dim=0).nonzero().flatten()
            widths[name] = (int(columns[0]), int(columns[-1]))
        return widths

    @classmethod
    def cardiothoracic_ratio(cls, masks: dict[str, torch.Tensor]) -> float | None:
        """The width of the heart divided by that of the lungs (`cardiothoracic_widths`); None where one is missing."""
        widths = cls.cardiothoracic_widths(masks)
        if widths is None:
            return None
        heart, lungs = (widths[name][1] - widths[name][0] + 1 for name in ("heart", "lungs"))
        return heart / lungs

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, `auto_map` for both back ends included."""
        return {**super().to_dict(), "auto_map": AUTO_MAP}

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """One picture -> (num_output_channels, H, W) float32 in 0..1, grey, at its own size, in the back end's form."""
        return self._to_backend(_radiograph(image, *args, **kwargs))

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        return _single_images(images, expected_ndims)

    def _prepare_image_like_inputs(
        self, images: ImageInput, *args: Any, expected_ndims: int = 3, **kwargs: Any
    ) -> list[Any]:
        prepared = []
        for index, image in enumerate(self._prepare_images_structure(images, expected_ndims)):
            try:
                prepared.append(self.process_image(image, *args, **kwargs))
            except ValueError as error:  # in a list of pictures, say which
                raise ValueError(f"image {index}: {error}") from error
        return prepared

    def _validate_preprocess_kwargs(self, *args: Any, **kwargs: Any) -> None:
        size = kwargs.get("size")
        if kwargs.get("do_resize") and size is not None and not (size.height and size.width):
            raise ValueError(f"size must give height and width, to which the whole image is resized; got {dict(size)}")
        if kwargs.get("num_output_channels") not in (1, 3):
            raise ValueError(f"num_output_channels must be 1 or 3; got {kwargs.get('num_output_channels')}")
        if kwargs.get("do_convert_rgb"):
            raise ValueError("do_convert_rgb is not offered: the output is grey; num_output_channels=3 repeats it")
        if kwargs.get("rescale_factor") is None:
            kwargs["rescale_factor"] = 1.0  # the base class asks for a number; here None is one, the type's
        super()._validate_preprocess_kwargs(*args, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs: Any
    ) -> BatchFeature:
        prepared = self._prepare_image_like_inputs(images, **kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        # The values are in 0..1 already; what remains for the back end is to resize and normalise.
        steps = {**kwargs, "do_rescale": False, "return_tensors": None}
        if steps["do_normalize"]:
            for name in ("image_mean", "image_std"):
                steps[name] = _per_channel(steps[name], steps["num_output_channels"], name)
        data = {"pixel_values": self._preprocess(prepared, **steps)["pixel_values"]}
        if segmentation_maps is not None:
            data["labels"] = self._labels(segmentation_maps, len(prepared), steps)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _labels(self, segmentation_maps: ImageInput, count: int, steps: dict[str, Any]) -> list[Any]:
        """Label maps through the same steps, nearest neighbour and not normalised -> (H, W) int64 each."""
        maps = [self._to_backend(_label_map(labels)) for labels in _single_images(segmentation_maps, ndim=2)]
        if len(maps) != count:
            raise ValueError(f"{len(maps)} segmentation maps for {count} images")
        steps = {**steps, "do_normalize": False, "resample": PILImageResampling.NEAREST}
        resized = self._preprocess(maps, **steps)["pixel_values"]
        return [torch.as_tensor(labels).squeeze(0).to(torch.int64) for labels in resized]

    def _to_backend(self, image: torch.Tensor) -> Any:
        """(C, H, W) in the form in which the back end works."""
        return image


class SpcxrImageProcessor(_RadiographProcessing, TorchvisionBackend):
    """Pictures of chest radiographs -> grey, 224 x 224, normalised; torchvision back end.

    | kind | values |
    |---|---|
    | PIL `L`, `LA`, `P`, `RGB`, `RGBA`; uint8 arrays and tensors | 8 bit: divided by 255 |
    | PIL `I;16` (any byte order), `I`; uint16 | 16 bit: divided by 65535 |
    | other integer types | 0..65535, divided by 65535; refused where all lie below 256, since that can be either |
    | PIL `F`; float arrays and tensors | must lie in 0..1, or in the `value_range` that you state |
    | PIL `1`; bool | 0 and 1 |

    The range follows from the type and never from the values; `rescale_factor` overrides it for integers (12 bits in a
    16-bit array: `1/4095`). Arrays are (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels, or a batch of those. RGB
    becomes its ITU-R BT.601 luminance; alpha is dropped. (4, H, W) is refused without `input_data_format`, since it can
    be four grey images, and (3, H, W) is one RGB picture. Lungs must be dark and bones bright: pictures do not state
    their polarity, DICOM files do, and `spcxr_hf.read_radiograph` applies it.

    The image is resized to `size` without cropping; its aspect ratio is not kept. At most 50 million pixels, 32,768
    along a side, and 50 times as long as wide. The model
    checks that the size is a multiple of its patch.

    Args:
        size: `{"height": int, "width": int}` in pixels.
        resample: PIL resampling filter; antialiased.
        rescale_factor: what integer values are multiplied by; left out, the type's range is used.
        value_range: (black, white), for values of any other range, such as floats of 0..255: `(0, 255)`. Values beyond
            it are refused.
        image_mean, image_std: on the scale 0..1, one value or one per output channel.
        num_output_channels: 1, or 3 to repeat grey for a model that expects RGB.
        overlapping_labels: whether the model's labels may overlap.

    The pipelines of transformers open files and convert pictures to 8-bit RGB by themselves, and that cuts 16-bit
    values off at 255, which leaves a white picture (there is a warning): give them 8-bit pictures, which is what
    `spcxr_hf.read_radiograph` returns.
    """

    def __init__(self, **kwargs: Unpack[SpcxrImageProcessorKwargs]):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)


class SpcxrImageProcessorPil(_RadiographProcessing, PilBackend):
    """[`SpcxrImageProcessor`] on Pillow, for where torchvision is missing; same options, same values."""

    def __init__(self, **kwargs: Unpack[SpcxrImageProcessorKwargs]):
        super().__init__(**kwargs)

    def resize(
        self,
        image: Any,
        size: SizeDict,
        resample: PILImageResampling | None = None,
        reducing_gap: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Resize a NumPy image (C, H, W) float32 to (C, size.height, size.width).

        In Pillow's float mode: the base class goes through 8 bits, which would lose the depth of 16-bit images.
        """
        resample = PILImageResampling.BILINEAR if resample is None else resample
        shape = (size.width, size.height)
        channels = [PIL.Image.fromarray(c).resize(shape, resample, reducing_gap=reducing_gap) for c in image]
        return torch.stack([torch.from_numpy(to_numpy_array(channel)) for channel in channels]).numpy()

    def _to_backend(self, image: torch.Tensor) -> Any:
        return image.detach().cpu().numpy()


__all__ = ["SpcxrImageProcessor", "SpcxrImageProcessorPil"]
