"""The op on a CUDA device, against the reference in fp64 on the same inputs."""

import pytest
import torch
from cases import MODES, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.core import engines

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sdpa_equals_the_reference_in_fp64(mode, data):
    case = data.draw(cases(mode))
    want = case.run("reference", device="cuda")
    errors = case.errors(case.run("sdpa", device="cuda"), want)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data(), width=st.sampled_from([8, 40, 64, 128]))
def test_sdpa_in_low_precision(dtype, mode, width, data):
    """At most twice the reference's own error in the same dtype, plus a few ulps of the terms that cancel."""
    case = data.draw(cases(mode))
    case.q_shape, case.k_shape = (*case.q_shape[:-1], width), (*case.k_shape[:-1], width)
    rounded = tuple(x.to(dtype).double() for x in case.tensors(torch.float64))
    case.tensors = lambda target, device="cpu": tuple(x.to(device, target, copy=True) for x in rounded)
    truth = case.run("reference", device="cuda")
    truth_scales = case.scales
    ours, plain = case.run("sdpa", dtype, "cuda"), case.run("reference", dtype, "cuda")
    ulp = torch.finfo(dtype).eps
    for name, want in truth.items():
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(ours[name]), finite), name
        want, got, base = (torch.where(finite, x.double(), 0.0) for x in (want, ours[name], plain[name]))
        # Flash rounds P and dS to the input's dtype before each product; the plain reference does not.
        allowed = 2 * (base - want).norm() + ulp * (2 * want.norm() + 0.5 * truth_scales.get(name, 0.0))
        assert (got - want).norm() <= allowed, name


def test_every_cuda_engine_is_used():
    half = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.float16)
    names = {engines.name(half), engines.name(half.float()), engines.name(half.double())}
    assert names == {"cuda_flash", "cuda_efficient", "eager"}
