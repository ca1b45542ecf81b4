import math

import numpy as np
import pyarrow as pa
import pytest

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import (
    CHEXPERT14,
    COMMON,
    NIH14,
    SYNONYMS,
    VINDR28,
    canonical_name,
    label_matrix,
    label_struct,
    labels_of,
    names_in,
    parse_classes,
    resolve,
    targets_of,
)

NAN = float("nan")


def table(**labels) -> pa.Table:
    return pa.table({"labels": label_struct(labels)})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("ignore", [1, 0, NAN, NAN, NAN]), ("zero", [1, 0, 0, NAN, NAN]), ("one", [1, 0, 1, NAN, NAN])],
)
def test_uncertain_follows_the_rule_and_missing_stays_missing(rule, expected):
    np.testing.assert_array_equal(resolve([1, 0, -1, None, NAN], rule), np.array(expected, np.float32))


def test_the_values_given_are_not_changed():
    values = np.array([-1, 1], np.float32)
    resolve(values, "one")
    assert values.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("values", "rule", "said"),
    [
        ([0, 2], "ignore", "row 1 holds 2"),
        ([0.5], "zero", "holds 0.5"),
        (["yes"], "one", "1, 0, -1"),
        ([1], "maybe", "maybe"),
    ],
)
def test_other_values_and_rules_are_refused(values, rule, said):
    with pytest.raises(SpcxrError, match=said):
        resolve(values, rule)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("Effusion", "Pleural Effusion"),
        ("pleural_effusion", "Pleural Effusion"),
        ("Pleural_Thickening", "Pleural Thickening"),
        ("Pulmonary fibrosis", "Fibrosis"),
        ("No finding", "No Finding"),
        ("COVID", "COVID-19"),
        (" Cardiomegaly ", "Cardiomegaly"),
        ("scoliosis", "scoliosis"),
    ],
)
def test_names_map_to_one(name, canonical):
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize(
    "apart",
    [
        ("Lung Opacity", "Airspace Opacity", "Consolidation", "Infiltration", "Pneumonia"),
        ("Nodule", "Mass", "Nodule/Mass", "Lung Lesion"),
        ("Fracture", "Rib Fracture", "Clavicle Fracture"),
        ("Normal", "No Finding"),
        ("Hernia", "Hiatal Hernia"),
    ],
)
def test_neighbours_are_not_merged(apart):
    assert len({canonical_name(name) for name in apart}) == len(apart)


def test_spaces_have_their_published_sizes_and_canonical_names():
    assert [len(NIH14), len(CHEXPERT14), len(VINDR28)] == [14, 14, 28]
    assert len(set(COMMON)) == len(COMMON)
    assert all(canonical_name(name) == name for name in COMMON)
    assert set(SYNONYMS.values()) <= set(COMMON)
    # by hand, from the two papers: what NIH and CheXpert share
    assert set(NIH14) & set(CHEXPERT14) == {
        "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Pneumonia", "Pneumothorax"
    }  # fmt: skip


def test_a_struct_holds_null_where_a_label_is_missing():
    struct = label_struct({"Effusion": [1, None, -1], "Mass": [0, 1, NAN]})
    assert struct.to_pylist() == [
        {"Pleural Effusion": 1.0, "Mass": 0.0},
        {"Pleural Effusion": None, "Mass": 1.0},
        {"Pleural Effusion": None, "Mass": None},
    ]


def test_a_union_keeps_what_each_did_not_label_as_missing():
    nih, chexpert = table(Effusion=[1, 0], Mass=[0, 1]), table(**{"Pleural Effusion": [None, 0], "Fracture": [1, None]})
    assert labels_of([nih, chexpert]) == ["Pleural Effusion", "Mass", "Fracture"]
    np.testing.assert_array_equal(
        label_matrix([nih, chexpert]),
        np.array([[1, 0, NAN], [0, 1, NAN], [NAN, NAN, 1], [0, NAN, NAN]], np.float32),
    )
    np.testing.assert_array_equal(label_matrix(chexpert, ["Fracture", "Effusion"]), [[1, NAN], [NAN, 0]])


def test_a_table_without_labels_and_a_null_struct_are_missing():
    whole = pa.table({"labels": pa.array([{"Mass": 1.0}, None], pa.struct([("Mass", pa.float32())]))})
    bare = pa.table({"id": ["a"]})
    np.testing.assert_array_equal(label_matrix([bare, whole], ["Mass"]), [[NAN], [1], [NAN]])


def test_tables_in_chunks_and_filtered_ones_are_read():
    rows = pa.concat_tables([table(Mass=[1, 0]), table(Mass=[None, 1])])
    np.testing.assert_array_equal(label_matrix(rows.slice(1, 2), ["Mass"]), [[0], [NAN]])


@pytest.mark.parametrize(
    ("names", "said"),
    [(["Mass", "Fracture"], "no set has the label Fracture"), (["Effusion", "pleural effusion"], "same label")],
)
def test_names_that_cannot_be_given_are_refused(names, said):
    with pytest.raises(SpcxrError, match=said):
        label_matrix(table(Effusion=[1], Mass=[0]), names)


def test_two_columns_of_one_label_are_refused():
    with pytest.raises(SpcxrError, match="same label: Pleural Effusion"):
        label_struct({"Effusion": [1], "Pleural_Effusion": [0]})
    with pytest.raises(SpcxrError, match="no labels"):
        label_struct({})


def test_targets_of_a_cell():
    classes = {"normal": ["normal"], "ill": ["viral", "bacterial"]}
    for cell, expected in (("viral", [0, 1]), ("normal", [1, 0]), ("other", None), (None, None), ([], [1, 0])):
        assert np.array_equal(targets_of(cell, classes, False), expected or [math.nan] * 2, equal_nan=True)
    for cell, expected in (
        (["viral", "normal"], [1, 1]),
        ([], [0, 0]),
        (None, [math.nan] * 2),
        ({"normal": False, "viral": None, "bacterial": True}, [0, 1]),
        ({"normal": True, "viral": None, "bacterial": False}, [1, math.nan]),
        ({"normal": 1.0, "viral": math.nan, "bacterial": 0.0}, [1, math.nan]),
        ({"normal": 0, "viral": -1, "bacterial": 0}, [0, math.nan]),
        (math.nan, [math.nan] * 2),
    ):
        assert np.array_equal(targets_of(cell, classes, True), expected, equal_nan=True)
    with pytest.raises(SpcxrError, match="viral: a label must be 1, 0, -1 .* got 0.2"):
        targets_of({"normal": 0, "viral": 0.2, "bacterial": 0}, classes, True)


def test_a_class_may_join_labels():
    words = ["normal", "pneumonia=bacterial+viral"]
    assert parse_classes(words) == {"normal": ["normal"], "pneumonia": ["bacterial", "viral"]}
    with pytest.raises(SpcxrError, match="a class appears twice among normal normal"):
        parse_classes(["normal", "normal"])


def test_what_a_cell_names():
    assert names_in(3, False) == ["3"] and names_in(None, True) == names_in(math.nan, False) == []
    assert (names_in([], False), names_in(["Mass"], False)) == (["normal"], ["abnormal"])
    assert names_in({"Mass": None, "Edema": 1}, True) == ["Mass", "Edema"]
    with pytest.raises(SpcxrError, match="multi_label needs lists or structs in the column of labels; it holds 'Mass'"):
        names_in("Mass", True)
