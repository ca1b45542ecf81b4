"""Takes off a classifier's bias what rounding its weights to 8 bits adds to the logits of every image alike.

Each rounded weight is a little off, and what that adds up to over the mean input of a layer is the same for all images.
It is measured on made-up images, whose detail fades with its frequency as that of a radiograph does, so that none has
to be at hand. The idea: Nagel et al., Data-Free Quantization (arXiv 1906.04721, section 4.2), there layer by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# For `SessionOptions.add_session_config_entry`: 8-bit products that cannot overflow on an x86 processor without VNNI.
EXACT_SUMS = ("session.x64quantprecision", "1")
IMAGES = 64
SLOPE = 2.0  # the amplitude of a frequency f is 1 / f ** SLOPE


def smooth_noise(count: int, channels: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Clouds: (count, channels, H, W) float32, each image of mean 0 and deviation 1, its channels alike."""
    height, width = size
    distance = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    amplitude = np.where(distance > 0, np.maximum(distance, 1) ** -SLOPE, 0.0)
    white = np.random.default_rng(seed).normal(size=(count, height, width))
    clouds = np.fft.ifft2(np.fft.fft2(white) * amplitude).real
    clouds /= clouds.std(axis=(1, 2), keepdims=True)
    return np.repeat(clouds[:, None], channels, axis=1).astype(np.float32)


def correct_bias(rounded: Any, exact: Path, size: tuple[int, int]) -> np.ndarray | None:
    """Move the bias of a rounded graph's classifier, in place, until its logits and the exact ones agree in mean.

    Args:
        rounded: An `onnx.ModelProto` in 8 bits, from `pixel_values` (B, channels, H, W) to `logits` (B, labels), whose
            last step adds a bias.
        exact: The file of the same graph in float32.
        size: Height and width of the images that are made up, in pixels.

    Returns:
        What was taken off, (labels,); None where the graph has no such bias, as an encoder or a segmentation model.
    """
    from onnx import numpy_helper

    last = next((node for node in rounded.graph.node if "logits" in node.output), None)
    biases = {tensor.name: tensor for tensor in rounded.graph.initializer}
    name = next((one for one in last.input if one in biases), None) if last and last.op_type == "Add" else None
    if name is None:
        return None
    images = smooth_noise(IMAGES, rounded.graph.input[0].type.tensor_type.shape.dim[1].dim_value, size)
    shift = (_run(rounded.SerializeToString(), images) - _run(str(exact), images)).mean(axis=0)
    moved = numpy_helper.to_array(biases[name]) - shift
    biases[name].CopyFrom(numpy_helper.from_array(moved.astype(np.float32), name))
    return shift


def _run(graph: bytes | str, images: np.ndarray) -> np.ndarray:
    """The logits (n, labels) of images (n, channels, H, W), one at a time: a batch has one scale for all of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": image[None]})[0] for image in images])
