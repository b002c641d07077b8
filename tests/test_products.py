"""float32 products on the CPU are oneDNN's where that pays, only if they are exact, and put back.

PyTorch has one setting for the whole process; see model/products.py.
"""

import pytest
import torch
import torch.nn.functional as F
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


def test_attention_between_short_rows_takes_the_default_forward_and_backward(monkeypatch):
    q = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), q)
    chosen = []
    choose = products.choose

    def note_and_choose(kind):
        chosen.append(kind)
        choose(kind)

    with products.products(products.ONEDNN):
        monkeypatch.setattr(products, "choose", note_and_choose)
        long = torch.randn(1, 2, products.LONG, 8)
        products.attention(long, long, long, mask=None, scale=0.5, grouped=False)
        assert chosen == []
        y = products.attention(q, q, q, mask=None, scale=0.5, grouped=False)
        (gradient,) = torch.autograd.grad(y.square().sum(), q)
        assert chosen == [products.DEFAULT, products.ONEDNN] * 2
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_onednn_is_refused_where_it_rounds_to_bfloat16(monkeypatch):
    product = torch.Tensor.__matmul__

    def rounded(x, y):
        if products.chosen() == products.ONEDNN and x.dtype == torch.float32:
            return product(x.bfloat16(), y.bfloat16()).float()
        return product(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.exact.__wrapped__()  # past the cache
