"""Splits by patient: disjoint patients, requested shares and labels, reproducible, refusals by name."""

import numpy as np
import pyarrow as pa
import pytest

from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError
from spcxr_hf.quality.splits import SHARES, number_patients, split_by_patient, with_splits


def table(**columns) -> RadiographTable:
    return RadiographTable(pa.table(columns), "made-up")


def random_set(seed: int, patients: int = 300, prevalence: tuple[float, ...] = (0.3, 0.1, 0.03)) -> RadiographTable:
    """One to six images of each patient, whose findings go together; some rows without a patient."""
    generator = np.random.default_rng(seed)
    names, findings = [], []
    for patient in range(patients):
        ill = generator.random(len(prevalence)) < prevalence
        for _ in range(int(generator.integers(1, 7))):
            names.append(f"p{patient}" if patient % 10 else None)
            findings.append([f"finding {number}" for number in np.flatnonzero(ill)])
    return table(patient=names, findings=pa.array(findings, pa.list_(pa.string())))


@pytest.mark.parametrize("seed", range(4))
def test_no_patient_is_on_two_sides(seed):
    rows = random_set(seed)
    splits = split_by_patient(rows, label_columns="findings", seed=seed)
    sides = {}
    for patient, split in zip(rows.column("patient"), splits, strict=True):
        if patient is not None:
            sides.setdefault(patient, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    assert set(splits) == set(SHARES)


def test_rows_without_a_patient_are_each_their_own():
    rows = table(patient=["a", None, "a", None, ""])
    assert number_patients(rows).tolist() == [0, 1, 0, 2, 3]
    assert number_patients(table(other=[1, 2, 3])).tolist() == [0, 1, 2]
    # A patient whose name is a number is not the row of that number.
    assert number_patients(table(patient=["1", None, "0"])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shares", [SHARES, {"a": 0.5, "b": 0.5}, {"train": 0.6, "val": 0.15, "test": 0.25}])
def test_shares_and_labels_are_balanced(seed, shares):
    rows = random_set(seed)
    splits = np.array(split_by_patient(rows, shares, "findings", seed=seed))
    findings = rows.column("findings")
    for label in [f"finding {number}" for number in range(3)] + [None]:
        has = np.array([label is None or label in found for found in findings])
        for name, share in shares.items():
            # A patient has six images at most: no split is further off than one patient of each label.
            assert abs((has & (splits == name)).sum() - share * has.sum()) <= 12, (label, name)


def test_one_label_for_each_patient_is_shared_out_exactly():
    labels = ["normal"] * 80 + ["viral"] * 20
    splits = split_by_patient(table(label=labels), label_columns="label")
    counts = {(label, split): 0 for label in set(labels) for split in SHARES}
    for one in zip(labels, splits, strict=True):
        counts[one] += 1
    assert counts == {
        ("normal", "train"): 64, ("normal", "val"): 8, ("normal", "test"): 8,
        ("viral", "train"): 16, ("viral", "val"): 2, ("viral", "test"): 2,
    }  # fmt: skip


def test_stratified_better_than_at_random():
    rows = random_set(5, patients=200, prevalence=(0.04,))
    has = np.array([bool(found) for found in rows.column("findings")])

    def worst(splits) -> float:
        return max(abs((has & (np.array(splits) == name)).sum() - share * has.sum()) for name, share in SHARES.items())

    with_labels = [worst(split_by_patient(rows, label_columns="findings", seed=seed)) for seed in range(8)]
    without = [worst(split_by_patient(rows, seed=seed)) for seed in range(8)]
    assert np.mean(with_labels) < np.mean(without) / 2


def test_several_columns_numbers_and_missing_labels():
    columns = {"sex": ["f", "m"] * 50, "grade": ([0] * 10 + [1] * 10 + [None] * 5) * 4}
    splits = np.array(split_by_patient(table(**columns), {"a": 0.5, "b": 0.5}, ["sex", "grade"]))
    for name, values in columns.items():
        for value in set(values) - {None}:
            has = np.array([one == value for one in values])
            assert abs((has & (splits == "a")).sum() - has.sum() / 2) <= 2, (name, value)


def test_the_same_seed_gives_the_same_splits_and_another_does_not():
    rows = random_set(1)
    first = split_by_patient(rows, label_columns="findings", seed=3)
    assert first == split_by_patient(rows, label_columns="findings", seed=3)
    assert first != split_by_patient(rows, label_columns="findings", seed=4)


def test_every_split_gets_somebody():
    rows = table(patient=["a"] * 50 + ["b", "c"])
    assert set(split_by_patient(rows)) == set(SHARES)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"patient": ["a", "b", "c"]}, {"shares": {}}, "no shares"),
        ({"patient": ["a", "b", "c"]}, {"shares": {"a": 0.5, "b": 0.4}}, r"add up to 1; these add up to 0\.9"),
        ({"patient": ["a", "b", "c"]}, {"shares": {"a": 1.5, "b": -0.5}}, "share of 'a' must be above 0"),
        ({"patient": ["a", "b", "c"]}, {"shares": {"a": float("nan"), "b": 0.5}}, "share of 'a'"),
        ({"patient": ["a", "b", "c"]}, {"shares": {"a": "half"}}, "share of 'a'.*'half'"),
        ({"patient": ["a", "a", "b"]}, {}, "made-up: 2 patients cannot be shared out among 3 splits"),
        ({"patient": pa.array([], pa.string())}, {}, "0 patients"),
        ({"patient": ["a", "b", "c"]}, {"label_columns": "colour"}, "made-up: no column 'colour'"),
        ({"label": [{"x": 1}] * 3}, {"label_columns": ["label"]}, "made-up: label holds a dict"),
    ],
)
def test_refusals(columns, settings, message):
    with pytest.raises(SpcxrError, match=message):
        split_by_patient(table(**columns), **settings)


def test_a_set_without_splits_gets_the_same_ones_every_time(capsys):
    rows = pa.table({"image": [None] * 20, "id": [str(row) for row in range(20)], "split": pa.nulls(20, pa.string())})
    table = RadiographTable(rows, "set")
    drawn = with_splits(table, "lung_split").column("lung_split")
    assert [drawn.count(name) for name in ("train", "val", "test")] == [16, 2, 2]
    assert capsys.readouterr().err == "set: has no splits; drawn by patient: 16 train, 2 val, 2 test\n"
    assert with_splits(table, "lung_split").column("lung_split") == drawn
    own = RadiographTable(rows.set_column(2, "split", pa.array(["val"] * 20)), "set")
    assert with_splits(own, "lung_split").column("lung_split") == ["val"] * 20
