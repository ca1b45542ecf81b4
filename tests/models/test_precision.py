"""bfloat16 on machines that multiply in it, and on those that do not."""

import logging

import pytest
import torch

from spcxr_hf.models import loading

SAID = "this CPU has no fast bfloat16: computing in float32"
ONES = torch.ones(2, 2)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    """A CPU of either kind."""
    loading.has_fast_bf16.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    yield request.param
    loading.has_fast_bf16.cache_clear()


def product(**options) -> torch.dtype:
    with loading.bf16_autocast(torch.device("cpu"), **options):
        return (ONES @ ONES).dtype


def test_a_slow_cpu_computes_in_float32_and_says_so_once(fast, caplog):
    with caplog.at_level(logging.WARNING):
        dtypes = {product(), product(enabled=True)}
    assert dtypes == {torch.bfloat16 if fast else torch.float32}
    assert [record.message.startswith(SAID) for record in caplog.records] == ([] if fast else [True])


def test_nothing_is_said_where_it_was_not_asked_for(fast, caplog):
    with caplog.at_level(logging.WARNING):
        assert product(enabled=False) == torch.float32
    assert not caplog.records


def test_a_card_is_taken_at_its_word(fast):
    assert loading.has_fast_bf16("cuda")


def test_without_onednn_bfloat16_is_slow(monkeypatch):
    loading.has_fast_bf16.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not loading.has_fast_bf16("cpu")
    loading.has_fast_bf16.cache_clear()
