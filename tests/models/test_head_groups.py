"""`head_groups`: each head takes one branch, judged head by head against the reference; and legacy mode."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    DilatedAttention,
    LongNetLM,
    MultiheadDilatedAttention,
    dilated_attention,
    head_groups,
    legacy_mode,
)
from dilated_attention_pytorch.head_groups import head_runs

# Dividing, not dividing, an offset beyond the segment (branch 3: offset 3 in segments of 3), and a segment beyond N.
BRANCHES = [(8, 1), (7, 3), (16, 4), (3, 5), (100, 6)]
PATTERN: dict[str, Any] = {"segment_lengths": [w for w, _ in BRANCHES], "dilation_rates": [r for _, r in BRANCHES]}


@pytest.fixture(autouse=True)
def _no_legacy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(head_groups.ENVIRONMENT, raising=False)
    monkeypatch.setattr(head_groups, "_warned", False)
    yield


def branch_of(head: int, num_kv_heads: int) -> int:
    """As 0.1 dealt heads out: one after the other, the first branches one more."""
    sizes = [num_kv_heads // len(BRANCHES) + (i < num_kv_heads % len(BRANCHES)) for i in range(len(BRANCHES))]
    return next(i for i in range(len(BRANCHES)) if head < sum(sizes[: i + 1]))


def expected(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """One head at a time through the reference.

    The paper's rule gives head h the offset `h mod r`, so of `offset + 1` copies of a head the last has the one wanted.
    """
    heads = []
    ratio = q.shape[-2] // k.shape[-2]
    for h in range(q.shape[-2]):
        kv = h // ratio
        length, rate = BRANCHES[i := branch_of(kv, k.shape[-2])]
        copies = [
            x[..., j : j + 1, :].expand(*x.shape[:-2], i % rate + 1, x.shape[-1]) for x, j in ((q, h), (k, kv), (v, kv))
        ]
        out = dilated_attention(
            *copies, segment_lengths=[length], dilation_rates=[rate], backend="reference", **options
        )  # fmt: skip
        heads.append(out[..., -1:, :])
    return torch.cat(heads, -2)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def close(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients; both are fp64, whose rounding over these few dozen terms stays far below 1e-12."""
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(wanted, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 17, 48, 61])
def test_each_head_is_the_reference_of_its_branch(length: int, is_causal: bool, backend: str) -> None:
    module = DilatedAttention(**PATTERN, head_groups=True, backend=backend)  # type: ignore[arg-type]
    q, k, v = draw(2, length, 12, 4), draw(2, length, 12, 4), draw(2, length, 12, 4)
    close(module(q, k, v, is_causal), expected(q, k, v, is_causal=is_causal), [q, k, v])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_keys_and_fewer_heads_than_branches(num_kv_heads: int) -> None:
    module = DilatedAttention(**PATTERN, head_groups=True, scale=0.3)
    q, k, v = draw(2, 40, 6, 4), draw(2, 40, num_kv_heads, 4), draw(2, 40, num_kv_heads, 4)
    close(module(q, k, v, True), expected(q, k, v, is_causal=True, scale=0.3), [q, k, v])


def test_padding_mask() -> None:
    module = DilatedAttention(**PATTERN, head_groups=True)
    q, k, v = draw(2, 40, 7, 4), draw(2, 40, 7, 4), draw(2, 40, 7, 4)
    mask = torch.rand(2, 40) > 0.3
    close(module(q, k, v, key_padding_mask=mask), expected(q, k, v, key_padding_mask=mask), [q, k, v])


def test_ranges_of_a_sequence() -> None:
    module = DilatedAttention(**PATTERN, head_groups=True)
    q, k, v = draw(1, 13, 7, 4), draw(1, 30, 7, 4), draw(1, 30, 7, 4)
    ranges: dict[str, Any] = {"q_start": 29, "k_start": 12, "seq_len": 50}
    mask = torch.rand(1, 50) > 0.2
    wanted = expected(q, k, v, is_causal=True, key_padding_mask=mask, **ranges)
    close(module(q, k, v, True, key_padding_mask=mask, **ranges), wanted, [q, k, v])


def test_packed_sequences_and_left_padding() -> None:
    module = DilatedAttention(**PATTERN, head_groups=True)
    q, k, v = draw(50, 7, 4), draw(50, 7, 4), draw(50, 7, 4)
    cu_seqlens = torch.tensor([0, 11, 11, 38, 50])
    wanted = expected(q, k, v, is_causal=True, cu_seqlens=cu_seqlens)
    close(module(q, k, v, True, cu_seqlens=cu_seqlens), wanted, [q, k, v])
    q, k, v = draw(3, 20, 7, 4), draw(3, 20, 7, 4), draw(3, 20, 7, 4)
    row_start = torch.tensor([0, 6, 19])
    close(module(q, k, v, True, row_start=row_start), expected(q, k, v, is_causal=True, row_start=row_start), [q, k, v])


@pytest.mark.parametrize("length", [24, 61])
def test_compiles_as_one_graph(length: int) -> None:
    """Also where r does not divide w and rows are gathered: which ones depends on lengths alone."""
    module = DilatedAttention(**PATTERN, head_groups=True)
    q, k, v = draw(1, length, 7, 4), draw(1, length, 7, 4), draw(1, length, 7, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v, True), module(q, k, v, True), [q, k, v])


def test_compiles_with_dynamic_shapes() -> None:
    module = DilatedAttention([4, 8], [1, 2], head_groups=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    q = torch.randn(1, 24, 3, 4)
    torch.testing.assert_close(compiled(q, q, q), module(q, q, q))


def test_heads_by_branch() -> None:
    sizes = [run.stop - run.start for run in head_runs(12, 5)]
    assert sizes == [3, 3, 2, 2, 2]  # the paper's twelve heads and five branches
    assert [run.stop - run.start for run in head_runs(2, 3)] == [1, 1, 0]
    covered = [h for run in head_runs(13, 4) for h in range(13)[run]]
    assert covered == list(range(13))


def test_dropout_differs_by_head_and_follows_the_seed() -> None:
    module = DilatedAttention([16, 16], [1, 1], attention_dropout=0.5, head_groups=True)
    q = torch.randn(1, 16, 1, 4).expand(1, 16, 2, 4)
    assert torch.equal(module(q, q, q, seed=5), module(q, q, q, seed=5))
    assert torch.equal(module(q, q, q, seed=5), module(q, q, q, seed=torch.tensor(5)))
    assert not torch.equal(module(q, q, q, seed=5), module(q, q, q, seed=6))
    first, second = module(q, q, q, seed=5).unbind(2)  # equal heads, in different branches
    assert not torch.equal(first, second)
    # Weights are dropped without bias: the mean over many masks is the value without dropout.
    many = q.expand(2000, 16, 2, 4)
    mean = module(many, many, many, seed=1)
    error = mean.std(0) / 2000**0.5
    assert ((mean.mean(0) - module.eval()(q, q, q)[0]).abs() < 6 * error + 1e-6).all()


def test_multihead_passes_it_on() -> None:
    module = MultiheadDilatedAttention(32, 4, segment_lengths=[8, 16], dilation_rates=[1, 2], head_groups=True)
    assert module.attention.head_groups and "head_groups=True" in repr(module)
    plain = MultiheadDilatedAttention(32, 4, segment_lengths=[8, 16], dilation_rates=[1, 2])
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 32, 32, requires_grad=True)
    out = module(x, x, x, is_causal=True)[0]
    assert not torch.allclose(out, plain(x, x, x, is_causal=True)[0])
    out.sum().backward()
    assert torch.equal(copy.deepcopy(module)(x, x, x, is_causal=True)[0], out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"offsets": "blocked"},
            ValueError,
            "expected offsets='modulo', padding='none' and segment_shift=0 with head_groups",
        ),
        (
            {"padding": "zero_keys"},
            ValueError,
            "expected offsets='modulo', padding='none' and segment_shift=0 with head_groups",
        ),
        ({"head_groups": 1}, TypeError, "expected head_groups to be a bool or None, got int"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention([8], [1], **{"head_groups": True, **options})


def test_call_errors_are_in_the_callers_terms() -> None:
    module = DilatedAttention(**PATTERN, head_groups=True)
    q = torch.randn(2, 20, 7, 4)
    for call, message in (
        ({"key_padding_mask": torch.ones(2, 19, dtype=torch.bool)}, r"shape \(B, N\) = \(2, 20\), got \(2, 19\)"),
        ({"seq_len": 19}, "seq_len of at least 20"),
        ({"row_start": torch.zeros(2, dtype=torch.long), "q_start": 1}, "expected row_start with whole sequences"),
        ({"row_start": torch.zeros(3, dtype=torch.long)}, r"row_start of shape \(B,\) = \(2,\)"),
        ({"row_start": torch.tensor([0, -1])}, "row_start of at least 0, got -1"),
        ({"q_start": -1}, "expected q_start to be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            module(q, q, q, **call)
    with pytest.raises(ValueError, match="expected cu_seqlens to run from 0 to 20"):
        module(q[0], q[0], q[0], cu_seqlens=torch.tensor([0, 19]))
    with pytest.raises(TypeError, match="expected is_causal to be a bool"):
        module(q, q, q, "yes")


@pytest.mark.parametrize("shape", [(0, 20), (2, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q = torch.randn(*shape, 7, 4)
    assert DilatedAttention(**PATTERN, head_groups=True)(q, q, q).shape == q.shape


class TestLegacyMode:
    def test_context(self) -> None:
        with pytest.warns(FutureWarning, match="legacy_mode is on") as caught, legacy_mode():
            inside, explicit = DilatedAttention([8], [1]), DilatedAttention([8], [1], head_groups=False)
            official = DilatedAttention([8], [1], offsets="blocked")
            multihead = MultiheadDilatedAttention(32, 4, segment_lengths=[8], dilation_rates=[1])
        assert caught[0].filename == __file__
        assert inside.head_groups and multihead.attention.head_groups
        assert not explicit.head_groups and not official.head_groups
        assert not DilatedAttention([8], [1]).head_groups
        q = torch.randn(1, 24, 2, 4)
        assert inside(q, q, q).shape == q.shape  # the layout stays with the module

    def test_leaves_when_something_is_raised(self) -> None:
        with pytest.warns(FutureWarning), pytest.raises(KeyError), legacy_mode():
            raise KeyError
        assert not DilatedAttention([8], [1]).head_groups

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(head_groups.ENVIRONMENT, "1")
        with pytest.warns(FutureWarning, match="DILATED_ATTENTION_LEGACY=1 is on") as caught:
            MultiheadDilatedAttention(32, 4, segment_lengths=[8], dilation_rates=[1])
        assert [w.filename for w in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert DilatedAttention([8], [1]).head_groups  # it has warned
        monkeypatch.setenv(head_groups.ENVIRONMENT, "0")
        assert not DilatedAttention([8], [1]).head_groups
        monkeypatch.setenv(head_groups.ENVIRONMENT, "yes")
        with pytest.raises(ValueError, match="DILATED_ATTENTION_LEGACY to be 0 or 1, got 'yes'"):
            DilatedAttention([8], [1])

    def test_what_would_lose_the_layout_refuses(self, tmp_path: Any) -> None:
        from dilated_attention_pytorch.models import save_pretrained

        with warnings.catch_warnings(action="ignore"), legacy_mode():
            model = LongNetLM(
                vocab_size=8, d_model=8, nhead=2, num_decoder_layers=1, dim_feedforward=8, segment_lengths=(4, 8),
                dilation_rates=(1, 2),
            )  # fmt: skip
        assert model(torch.randint(8, (1, 12))).shape == (1, 12, 8)
        with pytest.raises(ValueError, match="expected a model with head_groups=False"):
            save_pretrained(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        with pytest.raises(ValueError, match="expected layers with head_groups=False"):
            model.shard_context(None)  # type: ignore[arg-type]

    def test_from_the_shell(self) -> None:
        code = "from dilated_attention_pytorch import DilatedAttention\nprint(DilatedAttention([8], [1]).head_groups)"
        environment = {**os.environ, head_groups.ENVIRONMENT: "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.stdout == "True\n" and done.stderr.count("FutureWarning") == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"seed": torch.tensor([3]).to_sparse()},
            TypeError,
            "seed to be a dense tensor, got torch.sparse_coo",
        ),
        (
            {"seed": torch.tensor(3, device="meta")},
            ValueError,
            "seed on q's device cpu or on the CPU, got meta",
        ),
        ({"row_start": torch.zeros(1, device="meta").long()}, ValueError, "expected row_start on q's device cpu or on"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(options, error, message):
    attention = DilatedAttention([4, 8], [1, 2], attention_dropout=0.1, head_groups=True)
    with pytest.raises(error, match=message):
        attention(*(torch.zeros(1, 8, 2, 4),) * 3, **options)
