"""What holds for every test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_of_the_environment() -> Iterator[None]:
    """A script that is tested in this process may ask torch for threads; the tests behind it keep to one core each."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
