"""Nearest neighbors: exact, without the query itself, the same after a round trip through the disk."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spcxr_hf import SpcxrError, SpcxrImageProcessor, SpcxrModel
from spcxr_hf.data.table import RadiographTable, read_table
from spcxr_hf.inference.neighbors import NeighborIndex, build_index
from spcxr_hf.models.encoders import load_encoder
from tests.common import build, tiny_config
from tests.made_up import picture, write_set


def features(count=40, width=8, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def index(count=40):
    return NeighborIndex.from_features(features(count), [f"image-{row}" for row in range(count)], "tiny")


def test_search_is_exact():
    queries = features(300, seed=1)  # more than go at once
    found = index().search(queries, k=3)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], features()[None], dim=2)
    best = cosines.topk(3, dim=1)
    assert len(found) == 300
    for one, rows, values in zip(found, best.indices.tolist(), best.values.tolist(), strict=True):
        assert [neighbor.id for neighbor in one] == [f"image-{row}" for row in rows]
        assert [neighbor.similarity for neighbor in one] == pytest.approx(values, abs=1e-6)


def test_a_query_excludes_itself():
    found = index().neighbors_of("image-7", k=4)
    assert len(found) == 4 and "image-7" not in {neighbor.id for neighbor in found}
    itself, *others = index().search(features()[7:8], k=5)[0]
    assert itself.id == "image-7" and itself.similarity == pytest.approx(1) and others == found
    assert index().search(features()[7:8], k=4, exclude=["image-7"])[0] == found
    assert len(index().neighbors_of("image-0", k=100)) == 39
    with pytest.raises(SpcxrError, match="'x' is not in this index"):
        index().neighbors_of("x")


def test_equal_ones_come_in_order():
    same = NeighborIndex.from_features(torch.ones(5, 2), list("edcba"))
    assert [neighbor.id for neighbor in same.neighbors_of("d", k=3)] == ["e", "c", "b"]


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "index.safetensors"
    index().save(path)
    loaded = NeighborIndex.load(path)
    assert loaded.ids == index().ids and loaded.model == "tiny" and len(loaded) == 40
    assert torch.equal(loaded.features, index().features)
    found, expected = loaded.neighbors_of("image-3"), index().neighbors_of("image-3")
    assert [one.id for one in found] == [one.id for one in expected]
    assert [file.name for file in path.parent.iterdir()] == ["index.safetensors"]


@pytest.mark.parametrize("kind", ["missing", "damaged", "other", "short", "ids", "long", "nan"])
def test_files_that_are_no_index(tmp_path, kind):
    path = tmp_path / "index.safetensors"
    header = {"format": "spcxr-neighbors-1", "ids": json.dumps(["a"] if kind == "short" else ["a", "b"]), "model": ""}
    if kind == "damaged":
        path.write_bytes(b"no tensors")
    elif kind != "missing":
        header |= {"other": {"format": "pt"}, "ids": {"ids": "["}}.get(kind, {})
        length = {"long": 2.0, "nan": float("nan")}.get(kind, 1.0)
        save_file({"features": torch.eye(3)[:2] * length}, path, metadata=header)
    with pytest.raises(SpcxrError, match=r"index\.safetensors"):
        NeighborIndex.load(path)


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [(torch.ones(2, 3), ["a"], "n ids"), (torch.ones(2, 3), ["a", "a"], "appears twice"),
     (torch.zeros(1, 3), ["a"], "a: its features are 0"), (torch.full((1, 3), torch.nan), ["a"], "not finite"),
     (torch.ones(0, 3), [], "needs")],
)  # fmt: skip
def test_features_that_are_refused(vectors, ids, message):
    with pytest.raises(SpcxrError, match=message):
        NeighborIndex.from_features(vectors, ids)


def test_queries_that_are_refused():
    with pytest.raises(SpcxrError, match="k must be"):
        index().search(features(1), k=0)
    with pytest.raises(SpcxrError, match=r"queries must be \(n, 8\)"):
        index().search(features(1, width=9))
    with pytest.raises(SpcxrError, match="2 ids to exclude for 1 queries"):
        index().search(features(1), exclude=["a", "b"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(SpcxrModel, tiny_config()).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return load_encoder(str(folder))


def test_an_index_of_a_folder(encoder, tmp_path):
    for row in range(5):
        Image.fromarray(picture(row)[0]).save(tmp_path / f"{row}.png")
    deep = picture(0)[0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = build_index(encoder, read_table(tmp_path), "tiny", batch_size=2)
    assert len(found) == 6
    assert all(name.endswith(".png") for name in found.ids)
    (name,) = (name for name in found.ids if name.endswith("0.png"))
    assert found.neighbors_of(name, 1)[0].id.endswith("deep.png")  # the same picture at 16 bits


def test_an_index_of_a_set(encoder, tmp_path):
    table = read_table(write_set(tmp_path / "set.parquet", ["train"] * 5))
    found = build_index(encoder, table, batch_size=3)
    assert found.ids == tuple(f"row-{row}" for row in range(5))
    again = build_index(encoder, table, batch_size=5)
    torch.testing.assert_close(found.features, again.features, rtol=1e-4, atol=1e-5)
    twice = RadiographTable(pa.concat_tables([table.rows, table.rows]), "twice")
    with pytest.raises(SpcxrError, match="appears twice"):
        build_index(encoder, twice)
