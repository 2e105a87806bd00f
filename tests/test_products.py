"""Products in half precision on CPUs that multiply float32 faster."""

import pytest
import torch
from torch.nn.functional import linear

import moesaic
from moesaic.models import products
from moesaic.models.products import CHUNK, FEW_ROWS, Linear, product, quicken

generator = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture
def slow(monkeypatch):
    """A CPU without units for half precision."""
    monkeypatch.setattr(products, "compute_dtype", lambda dtype, device: torch.float32)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda dtype, device: dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(FEW_ROWS + 1,), (2, 9)])
@pytest.mark.parametrize("outputs", [3, CHUNK, 2 * CHUNK + 1])
@torch.no_grad()
def test_a_product_is_that_of_float32_rounded_once(slow, rows, outputs, dtype):
    x, weight, bias = normal(*rows, 24, dtype=dtype), normal(outputs, 24, dtype=dtype), normal(outputs, dtype=dtype)
    exact = linear(x.float(), weight.float())
    torch.testing.assert_close(product(x, weight), exact.to(dtype), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(product(x, weight, bias), exact.to(dtype) + bias, rtol=2**-6, atol=1e-2)
    turned = weight.mT.contiguous().mT
    assert torch.equal(product(x, turned), product(x, weight))


@torch.no_grad()
def test_few_rows_and_other_machines_multiply_as_ever(slow):
    weight = normal(700, 24)
    for x in (normal(FEW_ROWS, 24), normal(0, 24)):
        assert torch.equal(product(x, weight), linear(x, weight))
    wide = normal(9, 24, dtype=torch.float32)
    assert torch.equal(product(wide, weight.float()), linear(wide, weight.float()))


@torch.no_grad()
def test_units_for_half_precision_are_used(fast):
    x, weight = normal(50, 24), normal(700, 24)
    assert torch.equal(product(x, weight), linear(x, weight))
    layer = torch.nn.Linear(24, 700).bfloat16()
    quicken(layer)
    assert type(layer) is torch.nn.Linear


def test_what_learns_gets_its_gradient(slow):
    x, weight = normal(9, 24), normal(7, 24).requires_grad_()
    product(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(7, 24), rtol=2**-6, atol=1e-2)


@torch.no_grad()
def test_layers_of_a_loaded_model_are_quickened(slow, monkeypatch, tmp_path):
    source, _ = moesaic.load("tiny")
    source.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    moesaic.load("tiny").tokenizer.save_pretrained(tmp_path / "half")
    tokens = torch.arange(40)[None]
    for folder, of_experts in ((tmp_path / "half", False), (converted(tmp_path), True)):
        model, _ = moesaic.load(folder)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert {type(layer) for layer in layers} == {Linear}
        found = model(tokens).logits.float()
        names = set(model.state_dict())
        monkeypatch.setattr(products, "compute_dtype", lambda dtype, device: dtype)
        model, _ = moesaic.load(folder)
        assert set(model.state_dict()) == names
        expected = model(tokens).logits.float()
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert of_experts == hasattr(model.config, "num_experts")
        monkeypatch.setattr(products, "compute_dtype", lambda dtype, device: torch.float32)


def converted(tmp_path):
    config = moesaic.ConvertConfig(plan="S2A2E8", tokens=2_048, format="moesaic")
    moesaic.convert(str(tmp_path / "half"), tmp_path / "out", config)
    return tmp_path / "out"
