"""The op written out in plain ops, and the op under torch.func: the same numbers, or an error that says what to do."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cases import MODES, Case, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import DilatedAttention, MultiheadDilatedAttention, dilated_attention
from dilated_attention_pytorch.kernels import decomposition, ops

PATTERN = {"segment_lengths": [8, 20], "dilation_rates": [1, 2]}
BATCHING = "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "dropout"])
@settings(max_examples=40)
@given(data=st.data())
def test_written_out_it_computes_what_the_op_does(mode: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(mode))
    assume(case.q_shape[-3] and case.k_shape[-3])
    want = case.run("reference")
    with mock.patch.object(ops, "attention", decomposition.attention):
        got = case.run("sdpa")
    if case.options.get("mixing_gradient") == "detached":  # forwards are written out, for exports
        got, want = ({name: found[name] for name in ("out", "lse")} for found in (got, want))
    # fp64: what another order of the sums leaves.
    assert all(error < 1e-12 for error in case.errors(got, want).values())


def test_symbols_are_traced_by_the_shape_function_not_by_the_decomposition() -> None:
    """Dropout is not written out, so a compiler with symbolic lengths would fail here if it took the decomposition."""
    torch._dynamo.reset()
    options = {"dropout_p": 0.2, "seed": 3, **PATTERN}
    compiled = torch.compile(lambda q: dilated_attention(q, q, q, **options), dynamic=True, backend="aot_eager")
    for n in (17, 30):
        q = torch.randn(1, n, 2, 8)
        torch.testing.assert_close(compiled(q), dilated_attention(q, q, q, **options))


def objective(q: Tensor, backend: str) -> Tensor:
    return dilated_attention(q, 2 * q, q.sin(), is_causal=True, backend=backend, **PATTERN).square().sum()


def transformed(name: str, q: Tensor, backend: str) -> Tensor:
    grad = torch.func.grad(lambda x: objective(x, backend))
    if name == "grad":
        return grad(q)
    if name == "vmap of grad":
        return torch.func.vmap(torch.func.grad(lambda x: objective(x[None], backend)))(q)
    if name == "grad around":
        return torch.func.grad(
            lambda x: torch.func.grad(lambda y: (y * objective(x, backend)).square().sum())(x).sum()
        )(q)
    if name == "grad of grad":
        return torch.func.grad(lambda x: grad(x).square().sum())(q)
    if name == "backward of grad":
        q = q.clone().requires_grad_()
        return torch.autograd.grad(grad(q).square().sum(), q)[0]
    return torch.func.jvp(grad, (q,), (q,))[1]


@pytest.mark.filterwarnings(BATCHING)
@pytest.mark.parametrize("name", ["grad", "vmap of grad", "grad around"])
def test_torch_func_gives_first_derivatives(name: str) -> None:
    q = torch.randn(2, 23, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(transformed(name, q, "auto"), transformed(name, q, "reference"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for jvp
@pytest.mark.parametrize("name", ["grad of grad", "backward of grad", "jvp of grad"])
def test_torch_func_refuses_second_derivatives(name: str) -> None:
    q = torch.randn(1, 9, 2, 4, dtype=torch.float64)
    assert transformed(name, q, "reference").isfinite().all()
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        transformed(name, q, "auto")


def test_functional_call_differentiates_parameters() -> None:
    module = MultiheadDilatedAttention(32, 4, **PATTERN)
    x, weights = torch.randn(2, 23, 32), dict(module.named_parameters())
    got = torch.func.grad(lambda w: torch.func.functional_call(module, w, (x, x, x))[0].square().sum())(weights)
    want = torch.autograd.grad(module(x, x, x)[0].square().sum(), list(weights.values()))
    torch.testing.assert_close(list(got.values()), list(want))


@pytest.mark.parametrize("module", [DilatedAttention(**PATTERN), MultiheadDilatedAttention(32, 4, **PATTERN)])
def test_jit_trace_is_refused(module: torch.nn.Module) -> None:
    x = torch.randn((1, 23, 32) if isinstance(module, MultiheadDilatedAttention) else (1, 23, 2, 4))
    with (
        pytest.warns(DeprecationWarning, match="torch.jit"),
        pytest.raises(NotImplementedError, match=r"torch\.export"),
    ):
        torch.jit.trace(module, (x, x, x))


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, 2, 4) for n in (3, 5)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (jagged, "pack its sequences with cu_seqlens"),
        (lambda: torch.randn(1, 9, 2, 4).to_sparse(), "call to_dense"),
        (lambda: torch.randn(1, 9, 2, 4).to_mkldnn(), "call to_dense"),
    ],
    ids=["nested", "sparse", "mkldnn"],
)
def test_other_layouts_say_what_to_do(make, message: str) -> None:
    x = make()
    with pytest.raises(TypeError, match=f"expected q to be a dense tensor.*{message}"):
        dilated_attention(x, x, x, **PATTERN)
