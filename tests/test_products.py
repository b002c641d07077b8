"""float32 products on the CPU are oneDNN's where that pays, only if they are exact, and put back.

PyTorch has one setting for the whole process; see model/products.py.
"""

import pytest
import torch
from conftest import make_base

from model import load_checkpoint, products
from model.lora import use
from toss.config import TrainConfig
from toss.scoring import score
from toss.training import train

CONFIG = TrainConfig(lr=1e-3, epochs=1, batch_size=4, rank=2, alpha=4)


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A base that is large enough for oneDNN's products, which are taken to be exact."""
    monkeypatch.setattr(products, "exact", lambda: True)
    return make_base(tmp_path / "wide", hidden_size=products.SMALLEST)


def fit(model, tokens, **options):
    return train(model, tokens, tokens.response.float(), CONFIG, **options)


@pytest.mark.parametrize("work", [score, fit])
def test_products_are_onednns_in_train_and_score_alone(work, wide, model, tokens, monkeypatch):
    def kinds(model):
        seen = set()
        model.model.norm.register_forward_hook(lambda *_: seen.add(products.chosen()))
        work(model, tokens)
        return seen

    before = products.chosen()
    assert kinds(model) == {before}  # tiny
    assert kinds(load_checkpoint(wide)) == {products.ONEDNN}
    assert products.chosen() == before
    monkeypatch.setattr(products, "exact", lambda: False)
    assert kinds(load_checkpoint(wide)) == {before}


def test_an_error_puts_the_products_back(wide, tokens):
    before = products.chosen()
    with pytest.raises(ZeroDivisionError):
        fit(load_checkpoint(wide), tokens, objective=lambda *_: 1 / 0)
    assert products.chosen() == before


@pytest.mark.skipif(not products.exact(), reason="this CPU's oneDNN rounds to bfloat16")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_onednn_changes_results_by_rounding_and_equally_each_time(
    checkpointing, wide, tokens, monkeypatch
):
    model = load_checkpoint(wide)
    model.gradient_checkpointing = checkpointing

    def results(onednn):
        monkeypatch.setattr(products, "exact", lambda: onednn)
        adapter = fit(model, tokens)
        scores = score(use(model, adapter), tokens)
        return torch.cat([*map(torch.flatten, adapter.tensors()), scores])

    fast = results(True)
    assert torch.equal(results(True), fast)
    assert torch.allclose(results(False), fast, rtol=1e-3, atol=1e-4)
