"""A checkpoint as ONNX, for ONNX Runtime and, through Transformers.js, for the browser; in float32 and in 8 bits.

export_onnx -> Graph                 the model with positions that are always interpolated, inside the graph
            -> _write_metadata       labels, mean, deviation, size, purpose, in the file's metadata
            -> _write_configs        config.json and preprocessor_config.json, as Transformers.js looks for them
quantize_int8                        8-bit weights, activations quantised as they come
"""

from __future__ import annotations

import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, atomic_folder, write_json
from spcxr_hf.hub.export import (
    ExportSource,
    check_channels,
    check_target,
    load_source,
    patch_weight,
    picture_processor,
    plain_config,
    problem_type,
)
from spcxr_hf.models.loading import label_names

MODEL_FILE = "onnx/model.onnx"  # where Transformers.js looks; the 8-bit one is model_quantized.onnx (its dtype "q8")
INT8_FILE = "onnx/model_quantized.onnx"
OUTPUTS = {
    "embedding": ["last_hidden_state", "pooler_output"],
    "classification": ["logits"],
    "segmentation": ["logits"],
}
OLDEST_OPSET = 18  # the oldest that torch's exporter writes
# torch 2.6 fails at the positions' interpolation, and later ones fail with onnxscript up to 0.6.0. From 0.6.1 to 0.7.0
# nothing fails, but an image of a single patch gets a wrong position.
FIRST_TORCH = (2, 7)
FIRST_ONNXSCRIPT = "0.7.1"
TORCH_EXPORTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIRST_TORCH
NODES = 33  # of the Gauss-Hermite rule; the mean of GELU is exact to six digits
# For `SessionOptions.add_session_config_entry`: 8-bit products that cannot overflow on an x86 processor without VNNI.
EXACT_SUMS = ("session.x64quantprecision", "1")
IMAGES = 64
SLOPE = 2.0  # the amplitude of a frequency f is 1 / f ** SLOPE


class Graph(nn.Module):
    """The forward pass that is exported: pixel values (B, C, H, W) -> the outputs of its task.

    It differs from the model in the embeddings alone. The positions are interpolated at every size, which at the native
    one is the identity: a condition on the size would be decided once, at export. And the patch projection has as many
    channels as were asked for.
    """

    def __init__(self, source: ExportSource, num_channels: int) -> None:
        super().__init__()
        self.model = source.model
        self.task = source.task
        self.weight = nn.Parameter(patch_weight(source, num_channels), requires_grad=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder: Any = self.model.base_model
        hidden_states, _ = encoder.encoder(self._embed(encoder.embeddings, pixel_values))
        if self.task == "segmentation":
            return (self._segment(encoder, hidden_states, pixel_values),)
        tokens = encoder.layernorm(hidden_states[-1])  # (B, 1 + N, D)
        pooled = tokens[:, 1:].mean(dim=1) if self.model.config.pooling == "mean" else tokens[:, 0]
        return (self.model.classifier(pooled),) if self.task == "classification" else (tokens, pooled)  # type: ignore[operator]

    def _embed(self, embeddings: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        projection = embeddings.projection
        patches = nn.functional.conv2d(pixel_values, self.weight, projection.bias, stride=projection.stride)
        cls_position, positions = embeddings.position_embeddings.split([1, embeddings.grid_size**2], dim=1)
        grid = positions.unflatten(1, (embeddings.grid_size, embeddings.grid_size)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        tokens = patches.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)  # (B, N, D)
        cls_token = (embeddings.cls_token + cls_position).expand(tokens.shape[0], -1, -1)
        return torch.cat([cls_token, tokens], dim=1)

    def _segment(self, encoder: Any, hidden_states: tuple, pixel_values: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        blocks = [encoder.layernorm(hidden_states[layer])[:, 1:] for layer in config.segmentation_layers]
        height, width = pixel_values.shape[-2:]
        logits = self.model.decoder(blocks, (height // config.patch_size, width // config.patch_size))  # type: ignore[operator]
        return nn.functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def export_onnx(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    opset: int = OLDEST_OPSET,
    dynamic: bool = True,
    num_channels: int = 3,
    processor: Any = None,
) -> Path:
    """Write a folder with `onnx/model.onnx`, `config.json` and `preprocessor_config.json`; returns the first.

    The graph takes `pixel_values` (B, num_channels, H, W), normalised, H and W multiples of the patch size (a rest at
    the right and at the bottom is cut off, not refused), and gives, float32:

    - encoder: `last_hidden_state` (B, 1 + N, D) and `pooler_output` (B, D), by the model's own pooling, mean or CLS;
    - classifier: `logits` (B, labels); softmax or, of a multi-label model, sigmoid makes them probabilities;
    - segmentation: `logits` (B, labels, H, W).

    The metadata of the file hold task, labels, thresholds, mean, deviation, size and purpose, as JSON strings. The
    configuration calls encoder and classifier "vit", by which Transformers.js knows what to run.

    Args:
        model: Folder or Hub id of a checkpoint of this family, or a model in memory (float32, CPU).
        output: The folder to write. One that is there already is replaced if it is an earlier export or empty.
        opset: ONNX operator set, at least 18; newer ones are no faster (`training_scripts/benchmarks/speed_onnx.py`).
        dynamic: Whether batch, height and width are free. Otherwise the batch is 1 and the size the image processor's.
        num_channels: 3 for RGB pictures (exact: each channel is weighed by its share of the luminance), or 1.
        processor: Image processor of a model in memory; by default one of its native size.

    Raises:
        SpcxrError: ONNX is not installed; the model cannot be loaded or exported; or the folder cannot be written.
    """
    source = load_source(model, processor)
    check_channels(source, num_channels)
    if opset < OLDEST_OPSET:
        raise SpcxrError(f"opset must be at least {OLDEST_OPSET}; got {opset}")
    onnx = _import_onnx()
    target = Path(output)
    check_target(target, ("config.json", "preprocessor_config.json", "onnx"))
    with atomic_folder(target) as partial:
        file = partial / MODEL_FILE
        file.parent.mkdir()
        try:
            _trace(Graph(source, num_channels).eval(), source, file, opset, dynamic, num_channels)
        except (RuntimeError, TypeError, ValueError, ImportError) as error:
            cause = " ".join(str(error).split())[:240]
            hint = "" if TORCH_EXPORTS else "; torch {}.{} is the first that can".format(*FIRST_TORCH)
            raise SpcxrError(f"{source.name}: torch {torch.__version__} cannot export it ({cause}){hint}") from error
        _write_metadata(onnx, file, source, num_channels)
        _write_configs(partial, source, num_channels)
    return target / MODEL_FILE


def _import_onnx() -> Any:
    try:
        import onnx
        import onnxscript
        from packaging.version import Version
    except ImportError as error:
        raise SpcxrError(f'{error.name} is missing: pip install "spcxr-hf[onnx]"') from error
    if Version(onnxscript.__version__) < Version(FIRST_ONNXSCRIPT):
        raise SpcxrError(
            f"onnxscript {onnxscript.__version__} is too old: before {FIRST_ONNXSCRIPT} an export fails, or is wrong "
            'for images of a single patch; pip install "spcxr-hf[onnx]"'
        )
    return onnx


def _trace(graph: Graph, source: ExportSource, file: Path, opset: int, dynamic: bool, num_channels: int) -> None:
    patch = source.model.config.patch_size
    free = torch.export.Dim.DYNAMIC
    # No two of these alike: torch.export takes equal sizes for one and the same.
    example = (2, num_channels, 5 * patch, 7 * patch) if dynamic else (1, num_channels, *source.size)
    with _quiet("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        torch.onnx.export(
            graph,
            (torch.zeros(example),),
            file,
            input_names=["pixel_values"],
            output_names=OUTPUTS[source.task],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=({0: free, 2: free, 3: free},) if dynamic else None,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """No warnings, and of these loggers errors alone: both report internals of the tools."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_metadata(onnx: Any, file: Path, source: ExportSource, num_channels: int) -> None:
    """Put what a reader of the file alone must know into it, each value as JSON."""
    config = source.model.config
    facts: dict[str, Any] = {
        "task": source.task,
        "notice": RESEARCH_NOTICE,
        "image_size": list(source.size),
        "image_mean": [source.mean] * num_channels,
        "image_std": [source.std] * num_channels,
        "patch_size": config.patch_size,
        "pooling": config.pooling,
    }
    if source.task != "embedding":
        facts["labels"] = label_names(source.model.config)
    if source.task == "classification":
        facts["problem_type"] = problem_type(config)
        facts["intended_use"] = config.intended_use
        facts["operating_points"] = getattr(config, "operating_points", None) or {}
        facts["operating_point"] = getattr(config, "operating_point", None)
    proto = onnx.load(file)
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in facts.items()})
    # torch notes the weights' shapes a second time, which is wrong once a quantiser transposes one.
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [entry for entry in proto.graph.value_info if entry.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    proto.producer_name, proto.doc_string = "spcxr_hf", RESEARCH_NOTICE
    onnx.checker.check_model(proto)
    onnx.save(proto, file)


def read_metadata(file: str | os.PathLike) -> dict[str, Any]:
    """What `export_onnx` wrote into a file: task, labels, image_size, image_mean, image_std, notice, ...

    Names with a dot are other tools' own notes and left out.
    """
    onnx = _import_onnx()
    try:
        proto = onnx.load(str(file), load_external_data=False)
        return {entry.key: json.loads(entry.value) for entry in proto.metadata_props if "." not in entry.key}
    except Exception as error:  # protobuf's own error derives from nothing narrower
        raise SpcxrError(f"{file}: no ONNX file of this package ({type(error).__name__})") from error


def _write_configs(folder: Path, source: ExportSource, num_channels: int) -> None:
    if source.task == "segmentation":  # no Transformers.js model has this graph: it is for ONNX Runtime
        config = json.loads(source.model.config.to_json_string())
        write_json(folder / "config.json", config | {"notice": RESEARCH_NOTICE})
    else:
        name = "ViTForImageClassification" if source.task == "classification" else "ViTModel"
        pooling = source.model.config.pooling
        plain_config(source, num_channels, architectures=[name], pooling=pooling).save_pretrained(folder)
    picture_processor(source, num_channels).save_pretrained(folder)


def quantize_int8(
    path: str | os.PathLike,
    output: str | os.PathLike | None = None,
    reduce_range: bool = False,
) -> Path:
    """Write an 8-bit version of an exported file: a quarter of the size, faster, slightly less exact.

    Dynamic quantisation: the weights of linear layers are stored in 8 bits, one scale per output channel, and their
    inputs quantised as they come, one scale per tensor. The inputs of each MLP's second layer are centred first
    (`centre_hidden_units`), and a classifier's bias is corrected by the mean remaining error (`correct_bias`).
    Attention, norms, convolutions and the classifier stay in float32: in 8 bits the latter cost most of the accuracy.

    Args:
        path: `model.onnx`, as `export_onnx` wrote it.
        output: The file to write; by default `model_quantized.onnx` beside it, which Transformers.js calls "q8".
        reduce_range: Use 7 bits for the weights. For x86 processors without VNNI (`lacks_vnni`), on which the sum of
            two products of 8 bits can overflow 16, where a session cannot be configured to sum exactly (`EXACT_SUMS`).

    Raises:
        SpcxrError: ONNX Runtime is not installed, or the file cannot be read or written.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise SpcxrError(f'{error.name} is missing: pip install "spcxr-hf[onnx]"') from error
    source = Path(path)
    target = source.with_name("model_quantized.onnx") if output is None else Path(output)
    size = read_metadata(source).get("image_size")  # refuses what is no ONNX file
    proto = _import_onnx().load(str(source), load_external_data=False)
    # Of the classifier's Gemm, the only one in the graph, the quantiser makes a MatMul of this name.
    classifier = [f"{node.name}_MatMul" for node in proto.graph.node if node.op_type == "Gemm"]
    partial = target.with_name(f".{target.name}.partial")
    try:
        centre_hidden_units(proto)
        with _quiet(""):  # the root logger: advice to preprocess first, which torch's exporter has done already
            quantize_dynamic(
                proto,
                partial,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=classifier,
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        rounded = _import_onnx().load(str(partial))
        if size and correct_bias(rounded, source, (size[0], size[1])) is not None:
            _import_onnx().save(rounded, str(partial))
        partial.replace(target)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise SpcxrError(f"{source}: cannot be quantised ({' '.join(str(error).split())[:240]})") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def lacks_vnni() -> bool:
    """Whether this is an x86 processor without VNNI, on which 8-bit products can overflow; False where it doesn't tell.

    A session with `EXACT_SUMS` does not. ONNX Runtime's own account of it: "When and why do I need to try U8U8?" in its
    documentation of quantisation.
    """
    cpus = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpus.is_file() and "vnni" not in cpus.read_text()


# ---- smaller errors of 8 bits ------------------------------------------------------------------------------------


def centre_hidden_units(proto: Any) -> int:
    """Centre the input of every linear layer after LayerNorm, linear layer and GELU, in place; how many there were.

    `proto` is an `onnx.ModelProto` as torch's exporter writes it: `MatMul` and `Add` with initializers.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    centred: list[Any] = []
    nodes: list[Any] = []
    for node in graph.node:
        first = _layer_before_gelu(node, producers, weights)
        bias = first and _bias_after(node, graph, weights)
        if first and bias:
            mean = _mean_of_gelu(*(numpy_helper.to_array(weights[name]).astype(np.float64) for name in first))
            shift = mean @ numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
            moved = numpy_helper.to_array(weights[bias]).astype(np.float64) + shift
            weights[bias].CopyFrom(numpy_helper.from_array(moved.astype(np.float32), bias))
            name = f"{node.name}_centre"
            centred.append(numpy_helper.from_array(mean.astype(np.float32), name))
            nodes.append(helper.make_node("Sub", [node.input[0], name], [f"{name}d"], name=name))
            node.input[0] = f"{name}d"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(centred)
    return len(centred)


def _layer_before_gelu(node: Any, producers: dict[str, Any], weights: dict[str, Any]) -> list[str] | None:
    """Scale and shift of the LayerNorm, weight and bias of the linear layer, whose GELU this MatMul reads; or None."""
    if node.op_type != "MatMul" or node.input[1] not in weights:
        return None
    seen: set[str] = set()
    left = [node.input[0]]
    while left:
        behind = producers.get(left.pop())
        if behind is None:  # a weight or a constant
            continue
        if behind.op_type == "Add" and (layer := _linear_after_norm(behind, producers, weights)):
            return layer if {"Erf", "Gelu"} & seen else None
        seen.add(behind.op_type)
        if behind.op_type not in ("Mul", "Add", "Div", "Erf", "Gelu", "Constant"):
            return None
        left.extend(behind.input)
    return None


def _linear_after_norm(add: Any, producers: dict[str, Any], weights: dict[str, Any]) -> list[str] | None:
    """The names of scale, shift, weight and bias where this Add ends a linear layer after a LayerNorm."""
    bias = [name for name in add.input if name in weights]
    product = next((producers[name] for name in add.input if name in producers), None)
    if not bias or product is None or product.op_type != "MatMul" or product.input[1] not in weights:
        return None
    norm = producers.get(product.input[0])
    if norm is None or norm.op_type != "LayerNormalization":
        return None
    return [norm.input[1], norm.input[2], product.input[1], bias[0]]


def _bias_after(node: Any, graph: Any, weights: dict[str, Any]) -> str | None:
    """The bias that is added to a MatMul, and to it alone."""
    users = [user for user in graph.node if node.output[0] in user.input]
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    bias = next((name for name in users[0].input if name in weights), None)
    return bias if bias and sum(bias in user.input for user in graph.node) == 1 else None


def _mean_of_gelu(scale: np.ndarray, shift: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """E[GELU((z * scale + shift) @ weight + bias)] over z of independent standard normals, by hidden unit."""
    centre, spread = shift @ weight + bias, np.sqrt(((scale[:, None] * weight) ** 2).sum(axis=0))
    points, shares = np.polynomial.hermite_e.hermegauss(NODES)
    values = torch.nn.functional.gelu(torch.from_numpy(centre[:, None] + spread[:, None] * points)).numpy()
    return (values * (shares / shares.sum())).sum(axis=1)


def smooth_noise(count: int, channels: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth noise: (count, channels, H, W) float32, each image of mean 0 and deviation 1, its channels alike."""
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
        rounded: An `onnx.ModelProto` in 8 bits, from `pixel_values` to `logits` (B, labels), whose last step adds a
            bias.
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
