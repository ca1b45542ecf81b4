"""Remote code: with `trust_remote_code=True` a checkpoint gives the same outputs without the package.

One other process, which cannot import the package, loads every kind of checkpoint by every Auto class and reports.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spcxr_hf
from spcxr_hf.hub.folder import CODE
from spcxr_hf.hub.folder import main as write_all_code
from spcxr_hf.modeling.configuration_spcxr import AUTO_MAP
from spcxr_hf.models.auto import MODEL_CLASSES
from tests.common import SIDE, assert_same, assert_same_weights, build, flatten, pixels, saved_config

AUTO_CLASSES = {auto.__name__: model_class for auto, model_class in MODEL_CLASSES.items()}
CHECKPOINTS = {model_class.__name__: model_class for model_class in AUTO_CLASSES.values()}
HEADS = ("reconstruction_head.", "classifier.", "decoder.")

pytestmark = pytest.mark.slow  # a process that imports everything
ELSEWHERE = '''
import json
import sys
from pathlib import Path
from types import SimpleNamespace


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("spcxr_hf", "modeling"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, NotInstalled())
try:
    import spcxr_hf
except ImportError:
    pass
else:
    sys.exit("the package can be imported: this shows nothing")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto import auto_factory

# AutoBackbone asks the Hub whether the repository exists, even for a folder.
auto_factory.hf_api = lambda: SimpleNamespace(repo_exists=lambda name: True)
transformers.logging.set_verbosity_error()


def flatten(output, name="output"):
    if isinstance(output, torch.Tensor):
        return {name: output}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {key: tensor for part, value in items for key, tensor in flatten(value, f"{name}.{part}").items()}


def altered(weights, stored):
    """How many stored tensors the model has, under whichever prefix, and which of them are not as they were stored."""
    pairs = {}
    for name, tensor in stored.items():
        own = [key for key in (name, "spcxr." + name, name.removeprefix("spcxr.")) if key in weights]
        pairs.update({key: torch.equal(weights[key], tensor) for key in own})
    return len(pairs), [key for key, equal in pairs.items() if not equal]


def load(folder, auto_class, images):
    auto = getattr(transformers, auto_class)
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    found, changed = altered(model.state_dict(), load_file(folder / "model.safetensors"))
    with torch.no_grad():
        outputs = flatten(model(images))
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / f"{auto_class}.safetensors")
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "missing": sorted(info["missing_keys"]),
        "found": found,
        "changed": changed,
        "training": model.training,
    }


def main(root, auto_classes, checkpoints):
    inputs = load_file(root / "inputs.safetensors")
    report = {}
    for checkpoint in checkpoints:
        folder = root / checkpoint
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        values = processor(inputs["picture"], return_tensors="pt").pixel_values
        save_file({"output": values}, folder / "AutoImageProcessor.safetensors")
        report[checkpoint] = {name: load(folder, name, inputs["images"]) for name in auto_classes}
        report[checkpoint]["AutoConfig"] = {"class": type(config).__name__, "module": type(config).__module__}
        report[checkpoint]["AutoImageProcessor"] = {
            "class": type(processor).__name__,
            "module": type(processor).__module__,
        }
    again = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    again.save_pretrained(root / "again")
    assert not [name for name in sys.modules if name.split(".")[0] in ("spcxr_hf", "modeling")]
    print(json.dumps(report))


main(Path(sys.argv[1]), *(names.split(",") for names in sys.argv[2:]))
'''


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> SimpleNamespace:
    """The folder of the checkpoints, the models in them, and what the other process found."""
    root = tmp_path_factory.mktemp("checkpoints")
    picture = torch.arange(60 * 50, dtype=torch.float32).reshape(60, 50).remainder(251) / 250
    save_file({"picture": picture, "images": pixels()}, root / "inputs.safetensors")
    processor = spcxr_hf.SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})
    models = {name: build(model_class) for name, model_class in CHECKPOINTS.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    saved = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("*/*.py")}
    for path in root.glob("*/*.py"):
        path.unlink()
    write_all_code([str(root)])  # as `make cards`

    caches = {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(root), ",".join(AUTO_CLASSES), ",".join(CHECKPOINTS)]
    done = subprocess.run(command, cwd=root, env={**os.environ, **caches}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    values = processor(picture, return_tensors="pt").pixel_values
    return SimpleNamespace(root=root, models=models, report=report, values=values, saved=saved)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_folder_holds_all_the_code(elsewhere, checkpoint):
    folder = elsewhere.root / checkpoint
    for name, source in CODE.items():
        assert (folder / name).read_bytes() == source.read_bytes()
        # What `save_pretrained` writes is a complete checkpoint, too.
        assert name == "handler.py" or elsewhere.saved[f"{checkpoint}/{name}"] == source.read_bytes()
    assert saved_config(folder)["auto_map"] == AUTO_MAP
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert "AutoImageProcessor" in processor["auto_map"]


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoImageProcessor", *AUTO_CLASSES])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_auto_class_gives_ours(elsewhere, checkpoint, auto_class):
    found = elsewhere.report[checkpoint][auto_class]
    ours = {"AutoConfig": spcxr_hf.SpcxrConfig, "AutoImageProcessor": spcxr_hf.SpcxrImageProcessor, **AUTO_CLASSES}
    assert found["class"] == ours[auto_class].__name__
    assert found["module"].startswith("transformers_modules.")


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_no_reinitialisation(elsewhere, checkpoint, auto_class):
    """Every encoder tensor is found and is as it was stored; only a head that the checkpoint lacks is new."""
    found = elsewhere.report[checkpoint][auto_class]
    encoder = [name for name in elsewhere.models[checkpoint].state_dict() if not name.startswith(HEADS)]
    assert found["changed"] == []
    assert found["found"] >= len(encoder) > 50
    assert not found["training"]
    assert all(name.startswith(HEADS) for name in found["missing"])
    if AUTO_CLASSES[auto_class].__name__ == checkpoint:
        assert found["missing"] == []
        assert found["found"] == len(elsewhere.models[checkpoint].state_dict())


@pytest.mark.parametrize(
    ("checkpoint", "auto_class"),
    [
        (checkpoint, auto_class)
        for checkpoint in CHECKPOINTS
        for auto_class, model_class in AUTO_CLASSES.items()
        if model_class.__name__ in (checkpoint, "SpcxrModel", "SpcxrBackbone")
    ],
)
def test_same_outputs(elsewhere, checkpoint, auto_class):
    """The classes whose weights are all there, against the package's own class in this process."""
    model = AUTO_CLASSES[auto_class].from_pretrained(elsewhere.root / checkpoint)
    with torch.no_grad():
        expected = flatten(model(pixels()))
    assert_same(load_file(elsewhere.root / checkpoint / f"{auto_class}.safetensors"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_same_pixel_values(elsewhere, checkpoint):
    found = load_file(elsewhere.root / checkpoint / "AutoImageProcessor.safetensors")
    assert_same(found["output"], elsewhere.values, rtol=0, atol=1e-6)


def test_saved_again_elsewhere(elsewhere):
    """What someone fine-tunes without the package is a complete checkpoint again."""
    folder = elsewhere.root / "again"
    assert saved_config(folder)["auto_map"] == AUTO_MAP
    assert (folder / "modeling_spcxr.py").read_bytes() == CODE["modeling_spcxr.py"].read_bytes()
    assert (folder / "configuration_spcxr.py").is_file()
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is spcxr_hf.SpcxrModel
    last = list(CHECKPOINTS)[-1]
    assert_same_weights(model.state_dict(), transformers.AutoModel.from_pretrained(elsewhere.root / last).state_dict())
