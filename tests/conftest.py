"""What holds for every test."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # as `make test` sets them; read when the libraries are imported
    os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True)
def threads_of_the_environment() -> Iterator[None]:
    """A script that is tested in this process may ask torch for threads; the tests behind it keep to one core each."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: with `--dist loadfile`, a long file at the end leaves the other cores idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
