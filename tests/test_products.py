"""Products in half precision on CPUs that multiply float32 faster."""

import pytest
import torch
from torch.nn.functional import linear

import moesaic
from moesaic.models import products
from moesaic.models.products import CHUNK, FEW_ROWS, Linear, product, quicken
from moesaic.store.opening import StoreOptions

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


@pytest.fixture
def seen(monkeypatch):
    """(dtype, rows, shape of the weights) of each product."""
    found = []

    def watched(x, weight, bias=None):
        found.append((x.dtype, x.numel() // x.shape[-1], tuple(weight.shape)))
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "linear", watched)
    return found


@torch.no_grad()
def test_only_many_rows_of_half_precision_are_widened(slow, seen):
    half, single = torch.bfloat16, torch.float32
    for rows, dtype, inside in ((FEW_ROWS, half, half), (FEW_ROWS + 1, half, single), (9, single, single)):
        product(normal(rows, 24, dtype=dtype), normal(700, 24, dtype=dtype))
        assert {found for found, _, _ in seen} == {inside}
        assert len(seen) == (2 if dtype != inside else 1)
        seen.clear()
    assert product(normal(0, 24), normal(700, 24)).shape == (0, 700)


@torch.no_grad()
def test_units_for_half_precision_are_used(fast, seen):
    product(normal(50, 24), normal(700, 24))
    assert seen == [(torch.bfloat16, 50, (700, 24))]
    layer = torch.nn.Linear(24, 700).bfloat16()
    quicken(layer)
    assert type(layer) is torch.nn.Linear


def test_what_learns_is_not_widened(slow, seen):
    x, weight = normal(9, 24), normal(7, 24).requires_grad_()
    product(x, weight).sum().backward()
    assert [dtype for dtype, _, _ in seen] == [torch.bfloat16]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(7, 24), rtol=2**-6, atol=1e-2)


def test_a_dynamic_length_is_exported(slow):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(7, 24), requires_grad=False)

        def forward(self, x):
            return product(x, self.weight)

    made = torch.export.export(Model(), (normal(9, 24),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert made.module()(normal(3, 24)).shape == (3, 7)


@pytest.fixture
def half(tmp_path):
    """The tiny model in bfloat16, dense and converted."""
    model, tokenizer = moesaic.load("tiny")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = moesaic.ConvertConfig(plan="S2A2E8", tokens=2_048, format="moesaic")
    moesaic.convert(str(tmp_path / "dense"), tmp_path / "converted", config)
    return tmp_path


@pytest.mark.parametrize("store", [None, StoreOptions(expert_memory="100%")])
@torch.no_grad()
def test_layers_and_experts_of_a_loaded_model_are_quickened(half, slow, seen, store):
    tokens = torch.arange(40)[None]
    model, _ = moesaic.load(half / "converted", store=store)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {Linear}
    found = model(tokens).logits.float()
    c = model.config
    inner = (2 * c.moe_intermediate_size, c.hidden_size)
    for shape in (inner, (c.hidden_size, c.moe_intermediate_size), (CHUNK, c.hidden_size)):  # experts, and the head
        assert any(dtype == torch.float32 and shape == own for dtype, _, own in seen), shape
    plain, _ = moesaic.load(half / "converted", dtype=torch.float32)
    expected = plain(tokens).logits
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@torch.no_grad()
def test_a_dense_model_is_quickened_and_keeps_its_names(half, slow):
    model, _ = moesaic.load(half / "dense")
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {Linear}
    assert set(model.state_dict()) == set(moesaic.load("tiny").model.state_dict())
