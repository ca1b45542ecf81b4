"""Check that converted weights compute the same as timm's ViT-S/16 and, given a checkout, the GMML release.

    python -m training_scripts.benchmarks.parity [--gmml_release CHECKOUT] [--output parity.json]

Both sides get the same random weights, biases and norms included, and the same images, in float32 on the CPU; nothing
is downloaded. The release is GPL-licensed and no part of this tree: its own training loop is run from the checkout, for
one batch and with a learning rate of 0, so that its loss and gradients are compared as it computes them.

Exit status 1 if any difference is above the limit. timm comes with the extra `test`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.modeling_spcxr import SpcxrForPreTraining
from spcxr_hf.models.convert import load_vit_state_dict
from spcxr_hf.training.arguments import parse_arguments, run_script
from spcxr_hf.transforms.group_masking import Corrupted, GroupMasking

LIMIT = 1e-5  # largest |difference| allowed
IMAGE_SIZE = 224
RELEASE_FILES = ("main.py", "utils.py", "vision_transformer.py")


@dataclass
class Arguments:
    """Compare converted weights with the models they come from."""

    gmml_release: str | None = field(default=None, metadata={"help": "folder of a checkout of the GMML release"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    batch_size: int = field(default=2, metadata={"help": "images to compare on, an even number"})
    seed: int = field(default=0, metadata={"help": "seed of weights, images and corruption"})


@dataclass(frozen=True)
class Difference:
    """One comparison: the largest |difference|, and the largest |value| for scale."""

    what: str
    difference: float
    value: float


def main() -> int:
    arguments = parse_arguments(Arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    images = torch.randn(arguments.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    differences = compare_timm(images, generator)
    if arguments.gmml_release is not None:
        differences += compare_release(Path(arguments.gmml_release), images, generator)
    print_table(differences)
    if arguments.output is not None:
        write_json(arguments, differences)
    # Not above, rather than below: NaN fails too.
    return int(not all(one.difference <= LIMIT for one in differences))


# ---- timm ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_timm(images: torch.Tensor, generator: torch.Generator) -> list[Difference]:
    """CLS and patch tokens after the final LayerNorm, on three channels and on one; `images` (B, 3, H, W)."""
    import timm

    vit: Any = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).eval()
    randomise(vit, generator)
    weights = vit.state_dict()
    grey = images[:, :1]
    pairs = {
        "3 channels": (vit.forward_features(images), encode(weights, images)),
        "1 channel": (vit.forward_features(grey.expand_as(images)), encode(weights, grey, num_channels=1)),
    }
    differences = []
    for channels, (theirs, ours) in pairs.items():
        differences.append(compare(f"timm, {channels}: CLS", theirs[:, 0], ours[:, 0]))
        differences.append(compare(f"timm, {channels}: patch tokens", theirs[:, 1:], ours[:, 1:]))
    return differences


def encode(weights: dict[str, torch.Tensor], images: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The tokens (B, 1 + N, D) of the converted model."""
    return load_vit_state_dict(weights, **arguments).spcxr(images).last_hidden_state


# ---- the GMML release ------------------------------------------------------------------------------------------


def compare_release(checkout: Path, images: torch.Tensor, generator: torch.Generator) -> list[Difference]:
    """Encoder, reconstruction, loss and gradients for one corrupted batch; `images` (B, 3, H, W)."""
    corrupted = GroupMasking()(images, generator)
    with import_release(checkout) as release:
        theirs = release.FullpiplineSiT(
            release.vits.vit_small(img_size=[IMAGE_SIZE]), release.RECHead(384, in_chans=3, patch_size=16)
        ).eval()
        randomise(theirs, generator)
        ours = load_vit_state_dict(theirs.state_dict())
        differences = compare_reconstruction("GMML, 3 channels", theirs, ours, corrupted.pixel_values)

        grey = load_vit_state_dict(theirs.state_dict(), num_channels=1)
        differences += compare_reconstruction("GMML, 1 channel", theirs, grey, corrupted.pixel_values[:, :1])

        their_loss = run_release_step(release, theirs, images, corrupted)
    our_loss = ours(corrupted.pixel_values, bool_masked_pos=corrupted.mask, labels=images).loss
    our_loss.backward()
    differences.append(compare("GMML, 3 channels: loss", torch.tensor(their_loss), our_loss.detach()))
    return [*differences, compare_gradients(theirs, ours)]


@torch.no_grad()
def compare_reconstruction(
    what: str, theirs: nn.Module, ours: SpcxrForPreTraining, images: torch.Tensor
) -> list[Difference]:
    """What the head reads, (B, N, D), and what it makes of it; theirs sees a grey image (B, 1, H, W) three times."""
    read: list[torch.Tensor] = []
    hook = ours.reconstruction_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    our_reconstruction = ours(images).reconstruction
    hook.remove()

    blocks = "-".join(str(block) for block in ours.config.reconstruction_layers or [])
    their_tokens = theirs.get_submodule("backbone")(images.expand(-1, 3, -1, -1), recons_blocks=blocks)
    their_reconstruction = theirs.get_submodule("head_recons")(their_tokens)
    if images.shape[1] == 1:
        their_reconstruction = their_reconstruction.mean(dim=1, keepdim=True)
    return [
        compare(f"{what}: encoder", their_tokens, read[0]),
        compare(f"{what}: reconstruction", their_reconstruction, our_reconstruction),
    ]


def compare_gradients(theirs: nn.Module, ours: SpcxrForPreTraining) -> Difference:
    """The largest difference over the gradients of all weights."""
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    # Conversion only renames here, so it renames gradients as well.
    renamed = load_vit_state_dict(gradients).state_dict()
    pairs = [(renamed[name], weight.grad) for name, weight in ours.named_parameters() if weight.grad is not None]
    if len(pairs) != len(renamed):
        raise SpcxrError(f"{len(renamed) - len(pairs)} weights have no gradient")
    return compare(
        "GMML, 3 channels: gradients",
        torch.cat([their.flatten() for their, _ in pairs]),
        torch.cat([our.flatten() for _, our in pairs]),
    )


@contextlib.contextmanager
def import_release(checkout: Path) -> Iterator[ModuleType]:
    """The checkout's training script as a module, for the length of a `with`.

    Its data sets are replaced by an empty module: they need files that the release does not contain, and their package
    is called `datasets`, as the one of Hugging Face.
    """
    absent = [name for name in RELEASE_FILES if not (checkout / name).is_file()]
    if absent:
        raise SpcxrError(f"{checkout}: no checkout of the GMML release ({', '.join(absent)} missing)")
    names = ["datasets", *(Path(name).stem for name in RELEASE_FILES)]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    empty: Any = ModuleType("datasets")
    empty.load_dataset = empty.datasets_utils = empty
    sys.modules["datasets"] = empty
    sys.path.insert(0, str(checkout))
    try:
        with warnings.catch_warnings():  # the script turns all warnings off, for everyone
            yield importlib.import_module("main")
    finally:
        sys.path.remove(str(checkout))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def run_release_step(release: Any, model: nn.Module, images: torch.Tensor, corrupted: Corrupted) -> float:
    """The loss by one step of the release's own training loop, on the CPU; its gradients stay in the model.

    The loop takes two crops of equal size per image, so the batch is given as two halves.
    """
    masks = corrupted.mask.expand_as(images).to(images.dtype)
    crops = [list(tensor.chunk(2)) for tensor in (images, corrupted.pixel_values, masks)]
    options = Namespace(output_dir="", batch_size=len(images), epochs=1, clip_grad=0.0)
    # The images are corrupted already; its defaults otherwise.
    vars(options).update(drop_replace=0.0, recons_blocks="6-8-10-12", drop_only=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor))
        patches.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
        # Only the main process draws example reconstructions, into an unrequested folder.
        patches.enter_context(mock.patch.object(release.utils, "is_main_process", lambda: False))
        patches.enter_context(mock.patch.object(Path, "mkdir"))
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        figures = release.train_one_epoch(model, [(crops, None)], optimizer, [0.0], [0.0], 0, None, options)
    return float(figures["loss"])


# ---- weights, figures ------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random values for every weight. As initialised, biases are 0 and norms 1, and a mix-up of two would go unseen."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            noise = torch.randn(weight.shape, generator=generator)
            if isinstance(module, nn.LayerNorm):
                weight.copy_(0.2 * noise + (name == "weight"))
            else:
                weight.copy_(0.05 * noise)


def compare(what: str, theirs: torch.Tensor, ours: torch.Tensor) -> Difference:
    if theirs.shape != ours.shape:
        raise SpcxrError(f"{what}: {tuple(ours.shape)} here, {tuple(theirs.shape)} there")
    return Difference(what, (theirs - ours).abs().max().item(), theirs.abs().max().item())


def print_table(differences: list[Difference]) -> None:
    print(f"{'max |difference|, limit ' + format(LIMIT, '.0e'):36}  difference  max |value|")
    for one in differences:
        verdict = "" if one.difference <= LIMIT else "  ABOVE"
        print(f"{one.what:36}  {one.difference:10.2e}  {one.value:11.2e}{verdict}")


def write_json(arguments: Arguments, differences: list[Difference]) -> None:
    result: dict[str, Any] = {"limit": LIMIT, "seed": arguments.seed, "batch_size": arguments.batch_size}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "timm")}
    if arguments.gmml_release is not None:
        # Of the files and not of a commit: a checkout need not carry its history.
        contents = {name: (Path(arguments.gmml_release) / name).read_bytes() for name in RELEASE_FILES}
        result["gmml_release_sha256"] = {name: hashlib.sha256(held).hexdigest() for name, held in contents.items()}
    result["differences"] = [asdict(one) for one in differences]
    Path(arguments.output or "").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
