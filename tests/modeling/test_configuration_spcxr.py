"""The configuration: presets, what is refused, and that it survives the disk."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from spcxr_hf.modeling import modeling_spcxr
from spcxr_hf.modeling.configuration_spcxr import AUTO_MAP, SIZES, SpcxrConfig
from spcxr_hf.modeling.modeling_spcxr import SpcxrModel
from tests.common import saved_config, tiny_config


@pytest.mark.parametrize(
    ("size", "hidden_size", "heads", "parameters"),
    [("tiny", 192, 3, 5_426_112), ("small", 384, 6, 21_469_056), ("base", 768, 12, 85_405_440)],
)
def test_presets(size, hidden_size, heads, parameters):
    config = SpcxrConfig.from_size(size)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (hidden_size, heads, 12)
    assert config.intermediate_size == 4 * hidden_size
    with torch.device("meta"):
        assert SpcxrModel(config).num_parameters() == parameters


def test_the_default_is_small():
    assert SpcxrConfig().to_dict() == SpcxrConfig.from_size("small").to_dict()


def test_preset_with_another_value():
    config = SpcxrConfig.from_size("tiny", image_size=112, hidden_size=96)
    assert (config.image_size, config.hidden_size, config.num_attention_heads) == (112, 96, 3)
    assert SIZES["tiny"]["hidden_size"] == 192


def test_unknown_preset():
    with pytest.raises(ValueError, match="size must be one of tiny, small, base; got 'huge'"):
        SpcxrConfig.from_size("huge")


def test_number_of_patches():
    assert SpcxrConfig(image_size=112, patch_size=16).num_patches == 49


@pytest.mark.parametrize(
    ("depth", "reconstruction", "segmentation"),
    [
        (12, [6, 8, 10, 12], [3, 6, 9, 12]),
        (24, [12, 16, 20, 24], [6, 12, 18, 24]),
        (4, [2, 3, 4], [1, 2, 3, 4]),
        (1, [1], [1]),
    ],
)
def test_layers_that_the_heads_read(depth, reconstruction, segmentation):
    config = SpcxrConfig(num_hidden_layers=depth)
    assert config.reconstruction_layers == reconstruction
    assert config.segmentation_layers == segmentation


WRONG = [
    *({name: value} for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") for value in (0, -1, 1.5)),
    *({name: value} for name in ("intermediate_size", "image_size", "patch_size") for value in (0, -16, "16", None)),
    {"image_size": [224, 224]},
    {"image_size": 100},
    {"patch_size": 15},
    {"hidden_size": 100},
    {"num_attention_heads": 5},
    {"num_channels": 2},
    {"hidden_act": "glue"},
    {"hidden_act": None},
    *({name: value} for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") for value in (-0.1, 1, "0.1")),
    *({"drop_path_rate": value} for value in (-0.1, 1.0, float("nan"), None)),
    *(
        {name: value}
        for name in ("initializer_range", "layer_norm_eps")
        for value in (0.0, -1.0, float("nan"), float("inf"))
    ),
    {"qkv_bias": "yes"},
    {"pooling": "max"},
    {"apply_layernorm": 2},
    {"reconstruction_depth": -1},
    {"segmentation_hidden_size": 0},
    {"segmentation_hidden_size": 33},
    {"semantic_loss_ignore_index": None},
    {"problem_type": "multilabel"},
    *(
        {name: value}
        for name in ("reconstruction_layers", "segmentation_layers")
        for value in ([], [0, 1], [13], [2, 1], [3, 3], ["3"], "3", 3)
    ),
    {"out_features": ["stage13"]},
    {"out_features": ["stage2", "stage1"]},
    {"out_indices": [13]},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_values_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises((StrictDataclassError, ValueError), match=rf"(?<!_){re.escape(name)}\b"):
        SpcxrConfig(**wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"num_channels": 3},
        {"drop_path_rate": 0},
        {"hidden_act": "relu"},
        {"problem_type": "regression"},
        {"reconstruction_layers": [12]},
        {"segmentation_layers": [1, 2]},
        {"reconstruction_depth": 0},
        {"out_indices": (-1,)},
    ],
    ids=str,
)
def test_right_values_are_taken(right):
    (name,) = right
    value = getattr(SpcxrConfig(**right), name)
    assert value == (list(right[name]) if name == "out_indices" else right[name])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pooling": "cls", "drop_path_rate": 0.1, "reconstruction_layers": [1, 4], "qkv_bias": False},
        {"out_features": ["stem", "stage3"]},
        {"out_indices": [1, 2]},
        {"id2label": {0: "Lung", 1: "Heart", 2: "Spine"}, "problem_type": "multi_label_classification"},
    ],
    ids=str,
)
def test_json_round_trip(changed, tmp_path):
    config = tiny_config(**changed)
    config.save_pretrained(tmp_path)
    loaded = SpcxrConfig.from_pretrained(tmp_path)
    for name, value in changed.items():
        assert getattr(loaded, name) == value
    # The version and the name of the folder are all that saving adds.
    added = {"transformers_version", "_name_or_path"}
    before, after = ({k: v for k, v in one.to_dict().items() if k not in added} for one in (config, loaded))
    assert after == before
    assert json.loads(loaded.to_json_string(use_diff=False)) == json.loads(
        SpcxrConfig.from_dict(loaded.to_dict()).to_json_string(use_diff=False)
    )


POINTS = {"Lung": {"youden": 0.25, "sensitivity 0.90": 0.0}, "Lung + Heart": {"youden": 1.0}}
LABELS = {"id2label": {0: "Lung", 1: "Heart", 2: "Spine"}, "label2id": {"Lung": 0, "Heart": 1, "Spine": 2}}
MULTI_LABEL = {"problem_type": "multi_label_classification"}


@pytest.mark.parametrize("default", [None, "youden"])
def test_operating_points_survive_the_disk(tmp_path, default):
    config = tiny_config(**LABELS, operating_points=POINTS, operating_point=default)
    config.save_pretrained(tmp_path)
    loaded = SpcxrConfig.from_pretrained(tmp_path)
    assert (loaded.operating_points, loaded.operating_point) == (POINTS, default)
    assert SpcxrConfig.from_dict(config.to_dict()).operating_points == POINTS


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"Lung": {"youden": 1.5}}, "must lie in \\[0, 1\\]; got 1.5 for 'Lung', 'youden'"),
        ({"Lung": {"youden": -0.01}}, "must lie in"),
        ({"Lung": {"youden": float("nan")}}, "must lie in"),
        ({"Lung": {}}, "no threshold for 'Lung'"),
        ({"lung": {"youden": 0.5}}, "got 'lung', and the labels are Lung, Heart, Spine"),
        ({"Lung + Liver": {"youden": 0.5}}, "got 'Lung \\+ Liver'"),
        ({"Lung + Lung": {"youden": 0.5}}, "different labels"),
        ({"Lung+Heart": {"youden": 0.5}}, "joined by"),
        ({"Lung": {"youden": "0.5"}}, "operating_points"),
        ({"Lung": {"youden": True}}, "operating_points"),
        ({"Lung": {"youden": None}}, "operating_points"),
        ({"Lung": 0.5}, "operating_points"),
        ({0: {"youden": 0.5}}, "operating_points"),
        ([0.5], "operating_points"),
    ],
    ids=str,
)
def test_operating_points_that_are_refused(points, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SpcxrConfig(**LABELS, operating_points=points)


def test_probabilities_of_labels_that_hold_together_are_not_added():
    assert SpcxrConfig(**LABELS, **MULTI_LABEL, operating_points={"Lung": {"youden": 0.5}})
    with pytest.raises((StrictDataclassError, ValueError), match="do not add up; got 'Lung \\+ Heart'"):
        SpcxrConfig(**LABELS, **MULTI_LABEL, operating_points={"Lung + Heart": {"youden": 0.5}})


def test_a_label_that_holds_a_plus_is_a_label():
    labels = {0: "air + fluid", 1: "neither"}
    assert SpcxrConfig(id2label=labels, **MULTI_LABEL, operating_points={"air + fluid": {"youden": 0.5}})


@pytest.mark.parametrize("points", [None, {}, {"Lung": {"youden": 0.5}, "Heart": {"other": 0.5}}], ids=str)
def test_the_default_operating_point_is_one_that_all_targets_have(points):
    with pytest.raises((StrictDataclassError, ValueError), match="operating_point must be a name .* got 'youden'"):
        SpcxrConfig(**LABELS, operating_points=points, operating_point="youden")


@pytest.mark.parametrize("other", [{"num_labels": 2}, {"id2label": {0: "Hand", 1: "Foot"}}, LABELS], ids=str)
def test_thresholds_stay_behind_with_their_head(other, tmp_path):
    tiny_config(**LABELS, operating_points=POINTS, operating_point="youden").save_pretrained(tmp_path)
    loaded = SpcxrConfig.from_pretrained(tmp_path, **other)
    assert loaded.operating_points is None and loaded.operating_point is None
    assert loaded.num_labels == (other.get("num_labels") or len(other["id2label"]))
    loaded.save_pretrained(tmp_path / "again")  # saving validates
    kept = SpcxrConfig.from_pretrained(tmp_path, image_size=64)
    assert kept.operating_points == POINTS


@pytest.mark.parametrize("other", [{"num_labels": 2}, {"id2label": {0: "Hand", 1: "Foot"}}], ids=str)
def test_thresholds_of_labels_that_are_gone_are_dropped_with_a_warning(other, tmp_path, caplog):
    config = tiny_config(**LABELS, operating_points=POINTS, operating_point="youden")
    for name, value in other.items():
        setattr(config, name, value)
    model = modeling_spcxr.SpcxrForImageClassification(config)
    assert model.config.operating_points is None and model.config.operating_point is None
    assert "thresholds belong to a head, and are dropped with its labels" in caplog.text
    renamed = modeling_spcxr.SpcxrForImageClassification(
        tiny_config(**LABELS, operating_points=POINTS, operating_point="youden")
    )
    assert renamed.config.operating_points == POINTS
    renamed.config.id2label = {0: "Hand", 1: "Foot"}
    renamed.save_pretrained(tmp_path)
    assert SpcxrConfig.from_pretrained(tmp_path).operating_points is None


def test_two_configurations_share_nothing():
    first, second = SpcxrConfig(), SpcxrConfig()
    first.auto_map["AutoModel"] = "elsewhere.Model"
    first.reconstruction_layers.append(99)
    assert second.auto_map == AUTO_MAP
    assert second.reconstruction_layers == [6, 8, 10, 12]


def test_auto_map_is_complete(tmp_path):
    """Every public class is named, and every name exists in the file that it names."""
    tiny_config().save_pretrained(tmp_path)
    assert saved_config(tmp_path)["auto_map"] == AUTO_MAP
    public = {name for name in modeling_spcxr.__all__ if name != "SpcxrPreTrainedModel"}
    assert {code.removeprefix("modeling_spcxr.") for auto, code in AUTO_MAP.items() if auto != "AutoConfig"} == public
    assert AUTO_MAP["AutoConfig"] == "configuration_spcxr.SpcxrConfig"


def test_intended_use_is_kept_and_belongs_to_the_head(tmp_path):
    use = {"population": "adults", "ages": [18, None], "views": ["PA", "AP"]}
    tiny_config(**LABELS, intended_use=use).save_pretrained(tmp_path)
    assert SpcxrConfig.from_pretrained(tmp_path).intended_use == use
    assert SpcxrConfig.from_pretrained(tmp_path, num_labels=2).intended_use is None


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"sex": "F"}, "may have population, ages and views; got 'sex'"),
        ({"ages": [18]}, "ages must be"),
        ({"ages": [18, 5]}, r"ages must be \[youngest, oldest\] in years, from 0 to 150; got \[18, 5\]"),
        ({"ages": ["18", "90"]}, "ages must be"),
        ({"ages": [-1, 5]}, "ages must be"),
        ({"ages": 18}, "ages must be"),
        ({"views": []}, "views must be names"),
        ({"views": "PA"}, "views must be names"),
        ({"population": 5}, "population must be text"),
        (["adults"], "intended_use"),
    ],
    ids=str,
)
def test_intended_use_that_is_refused(use, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SpcxrConfig(intended_use=use)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"hidden_size": 6 * 10**6},
        {"intermediate_size": 10**12},
        {"image_size": 16 * 10**6},
        {"patch_size": 10**7, "image_size": 10**7},
        {"segmentation_hidden_size": 32 * 10**6},
        {"reconstruction_depth": 10**9},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_memory_is_taken(sizes):
    with pytest.raises((StrictDataclassError, ValueError), match="parameters; it may have|may be at most"):
        SpcxrConfig(**sizes)


def test_numbers_of_labels_may_be_text(tmp_path):
    """As JSON has them."""
    named = {"0": "normal", "1": "pneumonia"}
    expected = {0: "normal", 1: "pneumonia"}
    assert SpcxrConfig(id2label=named).id2label == expected
    tiny_config().save_pretrained(tmp_path)
    assert SpcxrConfig.from_pretrained(tmp_path, id2label=named).id2label == expected
    config = tiny_config()
    config.id2label = named
    assert modeling_spcxr.SpcxrForImageClassification(config).config.id2label == expected
    with pytest.raises((StrictDataclassError, ValueError), match="id2label maps numbers to labels"):
        SpcxrConfig(id2label={"normal": 0})
