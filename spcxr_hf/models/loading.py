"""Loading a checkpoint and running it: the one loader and the one forward pass of the package.

load_checkpoint     a folder or Hub id -> `Loaded`: model in evaluation mode, image processor, device
  load_config         its configuration
  load_network        its weights, in a class of transformers or of this family, missing weights checked
  load_processor      its image processor
to_pixel_values     pictures -> pixel values, by the image processor
forward             pixel values -> the model's outputs, in bfloat16 if asked
probabilities       logits -> probabilities, by the problem type of the configuration

Weights are read from safetensors alone, and code in a checkpoint is never run. Errors of a
checkpoint are one-line `SpcxrError`s that name it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, logging

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.images.reader import to_8_bit
from spcxr_hf.modeling.modeling_spcxr import FEATURE_STATISTICS, check_weight_files
from spcxr_hf.models.auto import MODEL_CLASSES, register

logger = logging.get_logger(__name__)

AUTO_CLASSES: dict[str, Any] = {
    "embedding": AutoModel,
    "reconstruction": AutoModelForPreTraining,
    "classification": AutoModelForImageClassification,
    "segmentation": AutoModelForSemanticSegmentation,
}
# Until the repositories are on the Hub.
OWN_IDS = "; two ways lead to it: `spcxr install` in a clone of the project, or HF_ENDPOINT=URL of a Hub that has it"
LARGEST_SIDE = 4096  # pixels of a model's input
SPCXR_CLASSES: dict[str, Any] = {model_class.__name__: model_class for model_class in MODEL_CLASSES.values()}


Statistics = dict[str, torch.Tensor]


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its image processor, what records call it (id@revision, folder), and
    of a classifier the statistics of its training images, where it has them (`models.typicality`)."""

    name: str
    model: PreTrainedModel
    processor: Any
    device: torch.device
    statistics: Statistics | None = None


def load_checkpoint(
    task: str, source: str | os.PathLike, device: str | torch.device = "auto", any_family: bool = False
) -> Loaded:
    """Load a model with its image processor.

    Args:
        task: "embedding", "reconstruction", "classification" or "segmentation".
        source: A folder or Hub id. An id that the local Hub cache has is loaded from there, without the network.
        device: "auto" (a GPU where there is one), or as `torch.device` has it: "cpu", "cuda:1", "mps".
        any_family: Whether models of other families than SPCXR are taken too.

    Raises:
        SpcxrError: the checkpoint is not there, is damaged, is of another family, was not trained for this task, or has
            no image processor; or there is no such device.
    """
    source, chosen = os.fspath(source), choose_device(device)
    config = load_config(source, any_family)
    model, _ = load_network(AUTO_CLASSES[task], source, config=config)
    statistics = load_statistics(source) if task == "classification" and config.model_type == "spcxr" else None
    return Loaded(name_with_revision(source), model.eval().to(chosen), load_processor(source), chosen, statistics)


def load_config(source: str, any_family: bool = True, **values: Any) -> Any:
    """The configuration of a checkpoint in a folder or on the Hub, with some of its fields changed to `values`."""
    register()  # a fresh process may have imported this module alone
    if not Path(source).is_dir():
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise SpcxrError(f"{source}: there is no such folder, and no Hub id is like that") from error
    elif not (Path(source) / "config.json").is_file():
        raise SpcxrError(f"{source}: no checkpoint, there is no config.json in this folder")
    cause = "no model that transformers loads" if is_local(source) else (
        "is not in the local Hub cache, and the Hub could not be asked for it or does not have it" + OWN_IDS
        * source.startswith("spcxr/"))  # fmt: skip
    with loading_errors(source, cause):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **_local_files(source), **values)
    if not any_family and config.model_type != "spcxr":
        raise SpcxrError(f"{source}: a model of the type {config.model_type}, not an SPCXR checkpoint")
    return config


def load_network(
    model_class: Any, source: str, new: Literal["nothing", "head", "pooler"] = "nothing", **options: Any
) -> tuple[Any, list[str]]:
    """A model with the weights of a checkpoint, and the names of the parameters that are newly initialised.

    Args:
        model_class: An Auto class, or a class of this family.
        source: A folder or Hub id.
        new: What may lack weights and is newly initialised then: a head, whose shape may be another one too, or a
            pooler.
        options: Of `from_pretrained`, such as `config` and `dtype`, or fields of the configuration.

    Raises:
        SpcxrError: the weights cannot be read, lack others than `new`, or hold parameters that the model does not have.
    """
    options = {"use_safetensors": True, "trust_remote_code": False, **_local_files(source), **options}
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise SpcxrError(f"{source}: no .safetensors weights in this folder")
    with loading_errors(source, "its weights cannot be loaded"), _quietly():
        check_weight_files(_folder_of(source))
        model, loading = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=new == "head", **options
        )
    # The mask token replaces masked patches in pretraining; no output of another task depends on it.
    fresh = sorted(
        name
        for name in {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
        if not name.endswith("mask_token")
    )
    encoder = f"{model.base_model_prefix}."
    allowed = {"nothing": lambda _: False, "head": lambda name: not name.startswith(encoder),
               "pooler": lambda name: "pooler" in name}[new]  # fmt: skip
    if lost := [name for name in fresh if not allowed(name)]:
        named = f"{lost[0]} among them" if len(lost) > 3 else ", ".join(lost)
        raise SpcxrError(f"{source}: no weights for {len(lost)} parameters of {type(model).__name__}: {named}")
    extra = sorted(loading["unexpected_keys"]) if model.config.model_type == "spcxr" else []
    if extra:
        raise SpcxrError(
            f"{source}: weights and configuration do not fit: {type(model).__name__} has no {', '.join(extra[:3])}"
        )
    return model, fresh


def load_processor(source: str, required: bool = True) -> Any:
    """The image processor of a checkpoint; None where there is none and none is required."""
    with loading_errors(source, "no image processor"):
        names = ("preprocessor_config.json", "processor_config.json")
        # An id whose weights have just come from the Hub is local, and its image processor has yet to come.
        is_here = Path(source).is_dir() or any(_is_in_cache(source, name) for name in names)
        options = _local_files(source) if is_here else {}
        if not required and not any(find_file(source, name, options) for name in names):
            return None
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **options)
        sides = [side for side in dict(getattr(processor, "size", None) or {}).values() if side is not None]
        if any(not 0 < side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"it makes images of {max(sides)} pixels a side; it may be 1 to {LARGEST_SIDE}")
        return processor


def load_statistics(source: str) -> Statistics | None:
    """The statistics of a checkpoint; None where it has none.

    Args:
        source: A folder or Hub id.

    Raises:
        SpcxrError: the file is damaged, or holds other tensors.
    """
    with loading_errors(source, f"{FEATURE_STATISTICS} cannot be used"):
        # As of the image processor; but where the Hub cannot be asked, a classifier works without them.
        options = _local_files(source) if Path(source).is_dir() or _is_in_cache(source, FEATURE_STATISTICS) else {}
        file = find_file(source, FEATURE_STATISTICS, {"_raise_exceptions_for_connection_errors": False, **options})
        if file is None:
            return None
        found = load_file(file)
        size = found["means"].shape[1]
        if found["precision"].shape != (size, size) or not found["distances"].numel() or not all(
            values.isfinite().all() for values in found.values()
        ):  # fmt: skip
            raise ValueError("its tensors do not fit each other, or are not finite")
    return found


def own_class(config: PreTrainedConfig) -> Any:
    """The class of this family that a configuration names."""
    name = (config.architectures or ["none"])[0]
    if name not in SPCXR_CLASSES:
        raise SpcxrError(f"config.json: its architecture {name} is none of {', '.join(SPCXR_CLASSES)}")
    return SPCXR_CLASSES[name]


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SpcxrError(f"no device {name!r} on this machine: {str(error).strip().partition(chr(10))[0]}") from error
    return device


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Choose the attention implementation; eager where a family has no fused one."""
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        if implementation != "sdpa":
            raise SpcxrError(f"attention {implementation!r} is refused ({one_line(error)})") from error
        model.set_attn_implementation("eager")


# ---- paths -------------------------------------------------------------------------------------------------------


def is_local(source: str) -> bool:
    """Whether a checkpoint is a folder, or an id that the local Hub cache has."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    return Path(source).is_dir() or bool(
        _cached_file(source, "config.json") and any(_cached_file(source, file) for file in weights)
    )


def name_with_revision(source: str) -> str:
    """A folder as it is; an id with the start of the revision that the cache holds it at."""
    file = None if Path(source).is_dir() else _cached_file(source, "config.json")
    return f"{source}@{file.parent.name[:12]}" if file else source


def _folder_of(source: str) -> Path:
    """The folder that the weights are read from, with its lists of weight files: of an id, in the local Hub cache."""
    if Path(source).is_dir():
        return Path(source)
    for name in ("model.safetensors.index.json", "adapter_config.json"):
        find_file(source, name, _local_files(source))
    return Path(str(cached_file(source, "config.json", **_local_files(source)))).parent


def find_file(source: str, name: str, options: dict[str, bool]) -> Path | None:
    """A file of a checkpoint, where it has it; of a Hub id, fetched with these options of `cached_file` if need be."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
    return None if found is None else Path(found)


def _cached_file(repo_id: str, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repo_id, file, cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _is_in_cache(repo_id: str, file: str) -> bool:
    """Whether the cache has a file, or knows that the repository has none of that name."""
    return try_to_load_from_cache(repo_id, file, cache_dir=constants.HF_HUB_CACHE) is not None


def _local_files(source: str) -> dict[str, bool]:
    return {"local_files_only": True} if is_local(source) else {}


@contextmanager
def loading_errors(source: str, problem: str) -> Iterator[None]:
    """Raise any library error about a checkpoint as a one-line `SpcxrError`."""
    try:
        yield
    except SpcxrError:
        raise
    except Exception as error:  # a damaged or hostile folder can make the libraries raise any type
        raise SpcxrError(f"{source}: {problem} ({one_line(error)})") from error


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without the bars of transformers: the weights of these models load within a second."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's bar, and without its table of missing weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar():
            yield
    finally:
        logging.set_verbosity(verbosity)


# ---- the forward pass --------------------------------------------------------------------------------------------


def to_pixel_values(processor: Any, images: Sequence[Image.Image], image_size: int | None = None) -> torch.Tensor:
    """Pictures of any sizes, grey of 8 or 16 bits, -> pixel values (B, C, H, W), as the image processor makes them.

    Another image processor than SPCXR's is given 8 bits and three channels; `image_size` is the side of the result in
    pixels, by default the image processor's.
    """
    if not hasattr(processor, "num_output_channels"):
        images = [to_8_bit(image).convert("RGB") for image in images]
    options = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    return processor(list(images), return_tensors="pt", **options)["pixel_values"]


def forward(model: PreTrainedModel, pixel_values: torch.Tensor, bf16: bool = False, **options: Any) -> Any:
    """The outputs of a model of any family on one batch, on any device; gradients are left to the caller.

    `bf16` computes in bfloat16 autocast; `options` are what the model's forward takes besides.
    """
    with bf16_autocast(model.device, bf16):
        return model(pixel_values=pixel_values.to(model.device), **forward_options(model), **options)


def forward_options(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's forward has to be given so that it takes images of other sizes than its native one."""
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if interpolates else {}


def label_names(config: PreTrainedConfig) -> list[str]:
    """The labels of a configuration in the order of the logits."""
    names = {int(index): str(label) for index, label in (config.id2label or {}).items()}
    return [names[index] for index in sorted(names)]


def is_multi_label(config: PreTrainedConfig) -> bool:
    """Whether each label has a probability of its own (a sigmoid): labels that may hold together, or a single one.

    Raises:
        SpcxrError: the model is for regression, whose outputs are no probabilities.
    """
    if config.problem_type == "regression":
        raise SpcxrError("a regression model gives no probabilities")
    return config.problem_type == "multi_label_classification" or config.num_labels == 1


def probabilities(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, labels) -> probabilities (B, labels), as the pipelines of transformers have them."""
    return logits.float().sigmoid() if is_multi_label(config) else logits.float().softmax(dim=-1)


# ---- precision ---------------------------------------------------------------------------------------------------


def bf16_autocast(device: torch.device | str, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16; on a CPU that has no fast matrix product in it, float32 as it is, and a warning, once."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and has_fast_bf16(kind))


@cache
def has_fast_bf16(kind: str) -> bool:
    """Whether a kind of device ("cpu", "cuda", ...) computes in bfloat16 at least as fast as in float32.

    Non-CPU devices are assumed to. A CPU without it (x86 without AVX-512, Arm without BF16) is many times slower in
    bfloat16: `training_scripts/benchmarks/speed.py --precision fp32 bf16` shows by how much.
    """
    if kind != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    logger.warning("this CPU has no fast bfloat16: computing in float32, which is faster here")
    return False
