"""There and back: the cards are published to a Hub that speaks the real protocol, and load from it by their ids.

In fresh processes: from an empty cache with the package; the same with the package blocked and `trust_remote_code`;
then both again offline, from what the first left in the cache. Everything equals what the publishing process computes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from spcxr_hf import SpcxrConfig, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.hub.expected_outputs import made_picture, record_outputs
from spcxr_hf.hub.publish import publish
from spcxr_hf.models.auto import MODEL_CLASSES
from tests.common import TINY
from tests.hub_server import HubServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
CARD = """---
library_name: transformers
pipeline_tag: image-classification
license: apache-2.0
---

# spcxr/findings

Not for clinical use.
"""
# Every class whose weights are all in the repository, and the pipeline of its task.
LOADS = {
    "spcxr/base": ("AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedImageModeling", "AutoBackbone"),
    "spcxr/lung-segmentation": ("AutoModel", "AutoModelForSemanticSegmentation"),
    "spcxr/findings": ("AutoModel", "AutoModelForImageClassification"),
}
PIPELINES = {
    "spcxr/base": "image-feature-extraction",
    "spcxr/lung-segmentation": "image-segmentation",
    "spcxr/findings": "image-classification",
}

LOADER = """
import json
import sys
from pathlib import Path

out, loads, pipelines, blocked, offline, revision = json.loads(sys.argv[1])
out = Path(out)


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("spcxr_hf", "modeling"):
            raise ImportError(f"{name} is not installed here")


if blocked:
    sys.meta_path.insert(0, NotInstalled())
else:
    import spcxr_hf

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
options = {"trust_remote_code": True} if blocked else {}
options |= {"revision": revision} if revision else {}
picture = Image.open(out / "picture.png")
tensors, modules = {}, set()


def backbone_class(repo):
    # `AutoBackbone` asks the Hub whether the repository exists, even where all of it is in the cache; this does not.
    if not blocked:
        return spcxr_hf.SpcxrBackbone
    return transformers.dynamic_module_utils.get_class_from_dynamic_module("modeling_spcxr.SpcxrBackbone", repo)


def keep(name, output):
    items = {"": output} if isinstance(output, torch.Tensor) else dict(output.items())
    for key, value in items.items():
        parts = value if isinstance(value, (tuple, list)) else [value]
        tensors.update({f"{name}/{key}/{n}": part.detach().contiguous() for n, part in enumerate(parts)})


for repo, autos in loads.items():
    processor = transformers.AutoImageProcessor.from_pretrained(repo, **options)
    values = processor(picture, return_tensors="pt").pixel_values
    keep(f"{repo}/processor", values)
    for auto in autos:
        loader = backbone_class(repo) if auto == "AutoBackbone" and offline else getattr(transformers, auto)
        model, info = loader.from_pretrained(repo, output_loading_info=True, **options)
        assert not info["missing_keys"], (repo, auto, info)
        modules.add(type(model).__module__.split(".")[0])
        with torch.no_grad():
            keep(f"{repo}/{auto}", model(values))
for repo, task in pipelines.items():
    pipe = transformers.pipeline(task, model=repo, **options)
    modules.add(type(pipe.image_processor).__module__.split(".")[0])
    answer = pipe(picture)
    if task == "image-segmentation":
        masks = {part["label"]: torch.from_numpy(np.array(part["mask"])) for part in answer}
        tensors.update({f"{repo}/pipeline/{label}": mask.contiguous() for label, mask in masks.items()})
    elif task == "image-classification":
        tensors.update({f"{repo}/pipeline/{part['label']}": torch.tensor(part["score"]) for part in answer})
    else:
        tensors[f"{repo}/pipeline"] = torch.tensor(answer)
assert not (blocked and [name for name in sys.modules if name.split(".")[0] in ("spcxr_hf", "modeling")])
save_file(tensors, out / "outputs.safetensors")
print(json.dumps(sorted(modules)))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub with the cards on it, their folder, and what this process computes from the folders."""
    root = tmp_path_factory.mktemp("world")
    cards = Path(shutil.copytree(CARDS, root / "cards"))
    torch.manual_seed(0)
    labels = {0: "normal", 1: "bacterial pneumonia", 2: "viral pneumonia"}
    config = SpcxrConfig(**{**TINY, "id2label": labels, "label2id": {name: key for key, name in labels.items()}})
    SpcxrForImageClassification(config).save_pretrained(cards / "findings")
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(cards / "findings")
    (cards / "findings" / "README.md").write_text(CARD)
    for folder in (cards / name for name in ("base", "lung-segmentation", "findings")):
        record_outputs(folder)
    Image.fromarray(made_picture(90, 120)).save(root / "picture.png")
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # the suite's own way is offline
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        token = hub.add_token("me", ("spcxr",))
        names = [repo.split("/")[1] for repo in LOADS]
        published = publish(cards, token=token, only=names)
        commits = {one.repo_id: one.commit for one in published}
        yield SimpleNamespace(hub=hub, root=root, cards=cards, token=token, names=names, commits=commits)


def load(world: SimpleNamespace, home: str, blocked: bool, offline: bool = False, **chosen) -> tuple[dict, list[str]]:
    """Everything by its id, in a fresh process with its own cache."""
    out = world.root / f"{home}-{offline}-{len(list(world.root.iterdir()))}"
    out.mkdir()
    shutil.copyfile(world.root / "picture.png", out / "picture.png")
    loads, pipelines = chosen.get("loads", LOADS), chosen.get("pipelines", PIPELINES)
    told = json.dumps([str(out), loads, pipelines, blocked, offline, chosen.get("revision")])
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORM"))}
    place = {"HF_HOME": str(world.root / home), "HF_ENDPOINT": world.hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    place |= {"HF_HUB_OFFLINE": "1" if offline else "0"}
    path = {} if blocked else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, told], env={**ours, **place, **path}, cwd=out, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(out / "outputs.safetensors"), json.loads(done.stdout.splitlines()[-1])


def expected(world: SimpleNamespace) -> dict[str, torch.Tensor]:
    """What the package's own classes give, from the folders that were published."""
    found = {}
    picture = Image.open(world.root / "picture.png")
    classes = {auto.__name__: model_class for auto, model_class in MODEL_CLASSES.items()}
    for repo, autos in LOADS.items():
        folder = world.cards / repo.split("/")[1]
        values = SpcxrImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
        found[f"{repo}/processor//0"] = values
        for auto in autos:
            with torch.no_grad():
                output = classes[auto].from_pretrained(folder)(values)
            for key, value in output.items():
                parts = value if isinstance(value, tuple | list) else [value]
                found.update({f"{repo}/{auto}/{key}/{number}": part for number, part in enumerate(parts)})
    base = found["spcxr/base/AutoModel/last_hidden_state/0"]
    found["spcxr/base/pipeline"] = base
    scores = found["spcxr/findings/AutoModelForImageClassification/logits/0"].softmax(-1)[0]
    names = ("normal", "bacterial pneumonia", "viral pneumonia")
    found |= {f"spcxr/findings/pipeline/{name}": score for name, score in zip(names, scores, strict=True)}
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    masks = {name for name in found if name.startswith("spcxr/lung-segmentation/pipeline/")}
    assert found.keys() - masks == wanted.keys()
    assert masks
    for name in found.keys() - masks:
        # A logit of 5 is known to 5e-7 in float32, and threads share sums out in their own ways: hence also relative.
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-6, atol=1e-6, msg=lambda words, n=name: f"{n}: {words}"
        )


@pytest.mark.parametrize("blocked", [False, True], ids=["with the package", "without the package"])
def test_every_class_and_pipeline_by_its_id(world, blocked):
    """From an empty cache, then offline from what that left there."""
    home = f"home-{blocked}"
    wanted = expected(world)
    online, modules = load(world, home, blocked)
    assert modules == (["transformers_modules"] if blocked else ["spcxr_hf"])
    assert_equal(online, wanted)
    world.hub.forget_requests()
    offline, modules = load(world, home, blocked, offline=True)
    assert modules == (["transformers_modules"] if blocked else ["spcxr_hf"])
    assert world.hub.requests == []
    assert_equal(offline, wanted)
    for name in online.keys() & offline.keys():
        assert torch.equal(online[name], offline[name]), name


def test_a_pinned_revision_keeps_the_old_weights(world):
    """By commit, and by the tag of the version, after another publish; without one the new weights come."""
    folder = world.cards / "findings"
    some = {"loads": {"spcxr/findings": ("AutoModelForImageClassification",)}, "pipelines": {}}
    name = "spcxr/findings/AutoModelForImageClassification/logits/0"
    before, _ = load(world, "home-pinned", False, **some)
    weights = load_file(folder / "model.safetensors")
    try:
        changed = {key: tensor + 0.5 for key, tensor in weights.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        record_outputs(folder)
        (new,) = publish(world.cards, token=world.token, only=["findings"])
        old = world.commits["spcxr/findings"]
        tag = next(
            ref.name for ref in HfApi(token=False).list_repo_refs("spcxr/findings").tags if ref.target_commit == old
        )
        assert new.commit != old
        after, _ = load(world, "home-pinned", False, **some)
        assert not torch.allclose(after[name], before[name])
        for home, blocked, revision in (("home-pinned", False, old), ("home-tag", True, tag)):
            pinned, _ = load(world, home, blocked, revision=revision, **some)
            torch.testing.assert_close(pinned[name], before[name], rtol=0, atol=1e-6)
    finally:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        record_outputs(folder)
        publish(world.cards, token=world.token, only=["findings"])
