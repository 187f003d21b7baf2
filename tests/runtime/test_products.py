"""Products by oneDNN against torch's own, in every form that a layer and its backward pass need."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from heeler.runtime import products
from heeler.runtime.products import product

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda x, w, d: (x.flatten(0, 1), w),
    "batches": lambda x, w, d: (x, w),
    "gradient of the input": lambda x, w, d: (d, w.t()),
    "gradient of the weight": lambda x, w, d: (d.flatten(0, 1).t(), x.flatten(0, 1).t()),
    "columns of a wider array": lambda x, w, d: (x[..., 3:23], w[:, 3:23]),
    "one row": lambda x, w, d: (x[0, :1], w),
}


@needs_onednn
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_a_product(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(*shape, generator=generator) for shape in ((3, 7, 40), (24, 40), (3, 7, 24)))
    a, b = FORMS[form](x, w, d)
    with mock.patch.object(products, "_onednn_for_float32", return_value=True):
        found = product(a, b)
    exact = a.double() @ b.double().t()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("kind", ["onednn", "plain"])
def test_who_multiplies(kind: str) -> None:
    """oneDNN where it is the faster one, in float32 only, and never where a gradient is recorded."""
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    with (
        mock.patch.object(products, "_onednn_for_float32", return_value=kind == "onednn"),
        mock.patch("torch.matmul", wraps=torch.matmul) as plain,
    ):
        product(x, w)
        assert plain.call_count == (kind == "plain")
        plain.reset_mock()
        y = product(x, w.requires_grad_())
        y.sum().backward()
        product(x.double(), w.detach().double())
        product(x.bfloat16(), w.detach().bfloat16())
        product(x[:0], w.detach())
        assert plain.call_count == 4
        with torch.no_grad():
            product(x, w)
        assert plain.call_count == 4 + (kind == "plain")
    torch.testing.assert_close(w.grad, x.sum(0).expand(6, 8))
