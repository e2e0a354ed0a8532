"""The names of 0.1 and 0.2: each warns once at the user's line, is the right object, and works."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch as package
from dilated_attention_pytorch import _deprecated
from dilated_attention_pytorch._old.calls import MEANINGLESS
from dilated_attention_pytorch._old.names import BY_PLACE, OLD_MODULES

NAME = package.__name__
PATTERN: dict[str, Any] = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
ROWS = [(place, name) for place, names in BY_PLACE.items() for name in names]
ALL = [pytest.param(place, name, id=f"{place}.{name}".strip(".")) for place, name in ROWS]


@pytest.fixture(autouse=True)
def _nothing_has_warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has used no old name yet."""
    monkeypatch.setattr(_deprecated, "_warned", set())
    for place in OLD_MODULES:
        if place != "dilated_attention":
            monkeypatch.delitem(sys.modules, f"{NAME}.{place}", raising=False)
            owner, _, name = f"{NAME}.{place}".rpartition(".")
            monkeypatch.delitem(vars(sys.modules.get(owner, package)), name, raising=False)
    yield


def as_user(source: str) -> tuple[dict[str, Any], list[warnings.WarningMessage]]:
    """Runs a user's script; its names, and the warnings it got."""
    names: dict[str, Any] = {"__name__": "user_script"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(source, "user_script.py", "exec"), names)
    return names, caught


def take(place: str, name: str) -> Any:
    """The object that an old spelling gives; its warning is not of interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"{NAME}.{place}" if place else NAME), name)


def heads(*, batch: int = 2, length: int = 32) -> Tensor:
    return torch.randn(batch, length, 4, 8, requires_grad=True)


def build(place: str, name: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A module made in the old way without anything that is ignored, its inputs, and what it makes of them."""
    old = take(place, name)
    x = torch.randn(2, 32, 32, requires_grad=True)
    q, k, v = heads(), heads(), heads()
    if name in {"DilatedAttentionConfig", "MultiheadConfig"}:
        factory = take("core", "create_multihead_dilated_attention")
        attention_config = take("core", "DilatedAttentionConfig")(**PATTERN)
        multihead_config = take("core", "MultiheadConfig")(32, 4)
        module = factory("improved", multihead_config=multihead_config, attention_config=attention_config)
        return module, [x], module(x, x, x, is_causal=True)[0]
    if name == "RingAttentionConfig":
        module = package.RingDilatedAttention(old(**PATTERN))
        return module, [q, k, v], module(q, k, v, is_causal=True)
    if name == "LongNet":
        module = old(
            d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64, **PATTERN
        )  # fmt: skip
        return module, [x], module(x)
    if name == "LongNetLM":
        module = old(num_tokens=20, d_model=32, nhead=4, num_decoder_layers=1, dim_feedforward=64, **PATTERN)
        return module, [], module(torch.randint(20, (2, 32)), is_causal=True)
    if name == "DilatedTransformerEncoderLayer":
        module = old(32, 4, [8, 16], [1, 2], 64, activation="gelu")
        return module, [x], module(x, is_causal=True)
    if name == "DilatedTransformerDecoderLayer":
        module = old(32, 4, [8, 16], [1, 2], 64)
        memory = torch.randn(2, 32, 32, requires_grad=True)
        return module, [x, memory], module(x, memory, tgt_is_causal=True, memory_is_causal=True)
    if name == "create_multihead_dilated_attention" and place != "multihead_dilated_attention":
        module = old("auto", embed_dim=32, num_heads=4, dropout=0.1, **PATTERN).eval()
        return module, [x], module(x, x, x, is_causal=True)[0]
    if name in {"MultiheadDilatedAttention", "create_multihead_dilated_attention"}:
        module = old(32, 4, [1, 2], [8, 16])
        out = module(x, x, x, is_causal=True)
        return module, [x], out if place == "multihead_dilated_attention" else out[0]
    if name in {"DistributedImprovedMultiheadDilatedAttention", "RingMultiheadDilatedAttentionV3"}:
        module = old(32, 4, [8, 16], [1, 2])
        return module, [x], module(x, x, x, is_causal=True)
    if name in {"ImprovedMultiheadDilatedAttention", "create_improved_multihead_dilated_attention"}:
        module = old(32, 4, [1, 2], [8, 16])
        return module, [x], module(x, x, x, is_causal=True)[0]
    if name in {
        "RingMultiheadDilatedAttentionHybrid", "RingDistributedDilatedAttention", "TrueRingMultiheadDilatedAttention",
        "create_ring_multihead_attention_hybrid",
    }:  # fmt: skip
        module = old(32, 4, [8, 16], [1, 2])
        return module, [x], module(x, x, x, is_causal=True)[0]
    if name == "create_dilated_attention" and place != "dilated_attention":
        module = old("improved", **PATTERN)
    elif name == "RingDilatedAttentionHilbert":
        module = old(package.RingAttentionConfig(**PATTERN), grid=(4, 8))
    elif name == "RingDilatedAttentionProduction":
        module = old(package.RingAttentionConfig(**PATTERN))
    else:
        module = old([8, 16], [1, 2])
    return module, [q, k, v], module(q, k, v, is_causal=True)


def successor(place: str, name: str) -> Any:
    """The new object, found where the warning sends the user."""
    module, _, attribute = f"{NAME}.{BY_PLACE[place][name].now}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


ALL_OF_0_2 = (
    "BlockSparseRingDilatedAttention BlockSparseRingDistributedDilatedAttention "
    "BlockSparseRingMultiheadDilatedAttention BlockSparseOptimized BlockSparseTorchSparse BlockSparseHierarchical "
    "HierarchicalConfig create_hierarchical_attention get_hierarchical_presets BlockSparseAdaptive AdaptiveConfig "
    "ImportanceScorer AdaptiveSparsityTrainer create_adaptive_block_sparse RingDilatedAttention RingDilatedAttentionV2 "
    "RingDilatedAttentionV2Collective RingDilatedAttentionProduction RingAttentionConfig "
    "create_production_ring_attention DilatedAttention DilatedTransformerDecoderLayer DilatedTransformerEncoderLayer "
    "DistributedImprovedDilatedAttention DistributedImprovedMultiheadDilatedAttention DistributedSparseConfig "
    "DistributedSparsePattern ImprovedDilatedAttention ImprovedMultiheadDilatedAttention LongNet "
    "MultiheadDilatedAttention PatternConfig PatternOptimizer PatternQualityAnalyzer PatternType SparsePatternConfig "
    "SparsePatternGenerator create_adaptive_sparse_attention create_block_sparse_attention create_dilated_attention "
    "create_multihead_dilated_attention RingDilatedAttentionV2Flash"
)


class TestEveryName:
    def test_the_list_is_the_promised_one(self) -> None:
        promised = (
            "RingDilatedAttentionProduction RingDilatedAttentionHybrid RingDilatedAttentionTrue RingDilatedAttentionV2 "
            "RingDilatedAttentionV2Collective RingDilatedAttentionV2Flash RingDilatedAttentionV3 "
            "RingDilatedAttentionHilbertOptimized RingDilatedAttentionHybridHilbert "
            "RingMultiheadDilatedAttentionHybrid ImprovedDilatedAttention ImprovedMultiheadDilatedAttention "
            "create_ring_multihead_attention_hybrid RingMultiheadDilatedAttentionV3 "
            "create_production_ring_attention create_dilated_attention create_multihead_dilated_attention "
            "DilatedTransformerEncoderLayer DilatedTransformerDecoderLayer"
        )
        assert set(promised.split()) <= set(BY_PLACE[""])
        places = "dilated_attention multihead_dilated_attention long_net transformer ring_dilated_attention_production"
        assert set(places.split()) <= set(OLD_MODULES)
        folder = Path(package.__file__).parent / "_old" / "places"
        files = {".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
        assert set(OLD_MODULES) == files

    @pytest.mark.parametrize(("place", "name"), ALL)
    def test_one_warning_at_the_users_line(self, place: str, name: str) -> None:
        module = f"{NAME}.{place}" if place else NAME
        source = f"import torch\n\nfrom {module} import {name} as Old\nfrom {module} import {name} as Again\nAgain\n"
        names, caught = as_user(source)
        assert names["Old"] is names["Again"]
        assert [(w.category, w.filename, w.lineno) for w in caught] == [(DeprecationWarning, "user_script.py", 3)]
        message = str(caught[0].message)
        now = f"{NAME}.{BY_PLACE[place][name].now}"
        assert name in message and now in message and "0.4.0" in message

    @pytest.mark.parametrize(("place", "name"), ALL)
    def test_right_object_forward_and_backward(self, place: str, name: str) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "the context of .* positions is longer than what can reach it")
            module, inputs, out = build(place, name)
        # Nothing was ignored, so nothing beside the name itself is worth a warning; `take` hides that one. A class that
        # has kept its name says that it was called as in 0.2.
        assert all(f"{name} was called with the arguments of 0.2" in str(w.message) for w in caught), caught
        new = successor(place, name)
        if isinstance(new, type) and issubclass(new, nn.Module):
            made = next(module.children()) if name == "DilatedAttentionConfig" else module
            assert isinstance(made, new)
        assert torch.isfinite(out).all()
        out.square().sum().backward()
        learned = [*inputs, *module.parameters()]
        assert learned and all(x.grad is not None and torch.isfinite(x.grad).all() for x in learned)

    @pytest.mark.parametrize(("place", "name"), ALL)
    def test_copies_pickles_and_state_dicts(self, place: str, name: str) -> None:
        module, _, _ = build(place, name)
        module.eval()
        x = heads().detach() if not list(module.parameters()) else torch.randn(2, 32, 32)
        call = {"LongNetLM": (torch.randint(20, (2, 32)),), "DilatedTransformerDecoderLayer": (x, x)}.get(
            name, (x, x, x)
        )
        if name in {"LongNet", "DilatedTransformerEncoderLayer"}:
            call = (x,)

        def run(one: nn.Module) -> Tensor:
            out = one(*call)
            return out[0] if isinstance(out, tuple) else out

        expected = run(module)
        copied = copy.deepcopy(module)
        assert torch.equal(run(copied), expected)
        assert torch.equal(run(copied), expected)  # a second forward after the copy
        restored = pickle.loads(pickle.dumps(module))
        assert type(restored) is type(module) and torch.equal(run(restored), expected)
        other, _, _ = build(place, name)
        other.eval()
        other.load_state_dict(module.state_dict())
        assert torch.equal(run(other), expected)


class TestNumbers:
    """What an old name computes is what the new one does, not what the old one did."""

    def test_multihead(self) -> None:
        old = take("dilated_attention", "MultiheadDilatedAttention")(32, 4, [1, 2], [8, 16])
        new = package.MultiheadDilatedAttention(32, 4, **PATTERN)
        new.load_state_dict(old.state_dict())
        x = torch.randn(2, 32, 32)
        assert torch.equal(old(x, x, x, True)[0], new(x, x, x, is_causal=True)[0])

    def test_masks_of_0_2_are_true_at_padding(self) -> None:
        old = take("multihead_dilated_attention", "MultiheadDilatedAttention")(32, 4, [1, 2], [8, 16])
        x = torch.randn(1, 32, 32)
        padding = torch.arange(32)[None] >= 20
        shorter = old(x[:, :20], x[:, :20], x[:, :20])
        torch.testing.assert_close(old(x, x, x, key_padding_mask=padding)[:, :20], shorter)

    def test_what_0_2_returned(self) -> None:
        x = torch.randn(1, 16, 32)
        standard = take("multihead_dilated_attention", "MultiheadDilatedAttention")(32, 4, [1, 2], [8, 16])
        assert isinstance(standard(x), Tensor)  # keys and values are the query where they are absent
        out, weights = standard(x, x, x, need_weights=True)
        assert torch.equal(out, standard(x, x, x)) and weights is None
        distributed = take("", "create_multihead_dilated_attention")("improved_distributed", 32, 4, [8, 16], [1, 2])
        assert isinstance(distributed(x), Tensor)
        improved = take("", "ImprovedMultiheadDilatedAttention")(32, 4, [1, 2], [8, 16])
        assert isinstance(improved(x, x, x), tuple)
        assert torch.equal(improved(x, x, x, True)[0], improved(x, x, x, is_causal=True)[0])

    @pytest.mark.parametrize("name", ["RingDilatedAttentionV2Collective", "RingDilatedAttentionHybrid"])
    def test_rings_take_the_whole_sequence(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ring = take("", name)([8, 16], [1, 2], 0.0, 4, torch.device("cpu"), torch.float32)
        q, k, v = heads(), heads(), heads()
        expected = package.dilated_attention(q, k, v, **PATTERN, is_causal=True)
        assert torch.equal(ring(q, k, v, is_causal=True), expected)

    @pytest.mark.parametrize("length", [1, 16, 23])
    def test_hilbert_rings_take_any_sequence_in_its_own_order(self, length: int) -> None:
        """0.2's layout: the smallest square that holds the sequence, row by row; results come back in order."""
        ring = take("", "RingDilatedAttentionHybridHilbert")([64], [1])
        q, k, v = heads(length=length), heads(length=length), heads(length=length)
        # One branch that holds everything sees the same keys in any order; fp32 sums differ by their rounding.
        expected = package.dilated_attention(q, k, v, segment_lengths=[64], dilation_rates=[1], is_causal=True)
        torch.testing.assert_close(ring(q, k, v, is_causal=True), expected)
        side = round(length**0.5 + 0.49) if length > 1 else 1
        assert side**2 >= length > (side - 1) ** 2 and len(ring.order.order) == length

    def test_decoder_layer_has_two_flags(self) -> None:
        layer = take("transformer", "DilatedTransformerDecoderLayer")(32, 4, [32], [1], 64, dropout=0.0)
        x, memory = torch.randn(1, 32, 32), torch.randn(1, 32, 32)
        changed = memory.clone()
        changed[:, 20:] += 1
        first = slice(0, 20)
        same = layer(x, memory, memory_is_causal=True)[:, first]
        assert torch.equal(layer(x, changed, memory_is_causal=True)[:, first], same)
        assert not torch.allclose(layer(x, changed)[:, first], layer(x, memory)[:, first])

    def test_norm_of_0_1_loads(self) -> None:
        module = take("dilated_attention", "MultiheadDilatedAttention")(32, 4, [1, 2], [8, 16])
        state = {key.replace("inner_attn_ln", "norm"): torch.randn_like(x) for key, x in module.state_dict().items()}
        module.load_state_dict(state)
        assert torch.equal(module.inner_attn_ln.weight, state["norm.weight"])

    def test_bidirectional_language_model(self) -> None:
        lm = take("long_net", "LongNetLM")(20, 32, 4, num_decoder_layers=1, dim_feedforward=64, **PATTERN)
        tokens = torch.randint(20, (1, 16))
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 20
        assert torch.equal(lm(tokens)[:, :-1], lm(changed)[:, :-1])
        assert not torch.allclose(lm(tokens, is_causal=False)[:, :-1], lm(changed, is_causal=False)[:, :-1])


class TestArguments:
    def test_what_means_nothing_is_named_once(self) -> None:
        script = (
            f"from {NAME} import RingDilatedAttentionV2Flash as Old\n"
            "ring = Old([8, 16], [1, 2], 0.1, 2, 'cpu', enable_memory_pool=True, flash_chunk_size=64)\n"
            "Old([8, 16], [1, 2], ring_size=4)\n"
        )
        names, caught = as_user(script)
        assert [w.lineno for w in caught] == [1, 2]
        assert str(caught[1].message).split("(see")[0].strip().endswith(
            "RingDilatedAttentionV2Flash ignores what means nothing since 0.3: "
            "ring_size, device, enable_memory_pool, flash_chunk_size"
        )  # fmt: skip
        assert names["ring"].config.dropout == 0.1

    @pytest.mark.parametrize(
        ("call", "check"),
        [
            ("DilatedAttention([8, 16], [1, 2], 0.5, 0.1)", lambda m: (m.scale, m.attention_dropout) == (0.5, 0.1)),
            ("DilatedAttention([8, 16], [1, 2], softmax_scale=0.5, op=None)", lambda m: m.scale == 0.5),
            (
                "MultiheadDilatedAttention(32, 4, [1, 2], [8, 16], 0.1, False, False)",
                lambda m: m.attention.segment_lengths == (8, 16) and m.q_proj.bias is None and m.inner_attn_ln is None,
            ),
            ("MultiheadDilatedAttention(32, 4, segment_lengths=[8], dilation_rates=[1], op=None)", lambda m: True),
            ("LongNet(32, 4, 1, 2, 64, [8], [1])", lambda m: m.config.num_decoder_layers == 2),
            (
                "LongNet(d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, activation=gelu)",
                lambda m: m.config.activation == "gelu",
            ),
            ("RingDilatedAttention([8, 16], [1, 2], 0.1, 4)", lambda m: m.config.dropout == 0.1),
            (
                "RingDilatedAttention(segment_lengths=[8], dilation_rates=[2])",
                lambda m: m.config.dilation_rates == (2,),
            ),
            (
                "RingAttentionConfig([8], [1], 0.1, mixed_precision=False, attention_scale=0.3)",
                lambda m: m.scale == 0.3,
            ),
        ],
    )
    def test_names_that_stayed_take_the_old_call(self, call: str, check: Any) -> None:
        name = call.partition("(")[0]
        source = f"from torch.nn.functional import gelu\nfrom {NAME} import {name}\n\nmade = {call}\n{call}\n"
        names, caught = as_user(source)
        assert [(w.category, w.filename, w.lineno) for w in caught] == [(DeprecationWarning, "user_script.py", 4)]
        assert "0.4.0" in str(caught[0].message)
        assert check(names["made"])

    def test_the_new_call_does_not_warn(self) -> None:
        source = (
            f"from {NAME} import *\n"
            "DilatedAttention([8], [1], scale=0.5)\n"
            "MultiheadDilatedAttention(32, 4, 0.1, True, segment_lengths=[8], dilation_rates=[1])\n"
            "LongNet(LongNetConfig(d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1))\n"
            "LongNet(d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, activation='relu')\n"
            "RingDilatedAttention(RingAttentionConfig(segment_lengths=[8], dilation_rates=[1]))\n"
        )
        assert as_user(source)[1] == []

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            ("ImprovedDilatedAttention([8], [1], segment_lengths=[8])", TypeError, "segment_lengths twice"),
            ("RingDilatedAttentionV2(*range(20))", TypeError, "expected at most 10 positional arguments"),
            ("ImprovedDilatedAttention([8], [1], use_tf33=True)", TypeError, "use_tf33"),
            ("ImprovedDilatedAttention([8], [1, 2])", ValueError, "of equal length"),
            ("ImprovedDilatedAttention([8], [1])(q, q, q, attention_mask=q)", ValueError, "expected no attention_mask"),
            ("ImprovedMultiheadDilatedAttention(30, 4, [1], [8])", ValueError, "embed_dim to be a multiple"),
            ("RingMultiheadDilatedAttentionHybrid(32, 4, [8], [1], gate_fn='relu')", ValueError, "expected gate_fn"),
            ("create_dilated_attention('fastest')", ValueError, "expected attention_type to be one of"),
            ("create_dilated_attention('block_sparse_ring')", ValueError, "has no successor"),
            ("create_multihead_dilated_attention('ring', gate_fn='relu')", ValueError, "expected gate_fn"),
            (
                "RingDilatedAttentionProduction(RingAttentionConfig([8], [1]), 4)",
                TypeError,
                "nothing beside the config",
            ),
        ],
    )
    def test_errors(self, call: str, error: type[Exception], message: str) -> None:
        names = {"RingAttentionConfig": package.RingAttentionConfig, "q": heads()}
        names[call.partition("(")[0]] = take("", call.partition("(")[0])
        with warnings.catch_warnings(), pytest.raises(error, match=message):
            warnings.simplefilter("ignore")
            eval(call, names)

    @pytest.mark.parametrize("name", ALL_OF_0_2.split())
    def test_public_names_of_0_2_are_here_or_say_why_not(self, name: str) -> None:
        if name not in package.__all__ and name not in BY_PLACE[""]:
            with pytest.raises(AttributeError, match=f"0.2's {name} is not dilated attention and has no successor"):
                getattr(package, name)

    @pytest.mark.parametrize("name", sorted(MEANINGLESS))
    @pytest.mark.parametrize(
        "call",
        [
            "create_multihead_dilated_attention('improved', 32, 4, [8, 16], [1, 2], {})",
            "create_multihead_dilated_attention('standard', 32, 4, [8, 16], [1, 2], {})",
            "create_multihead_dilated_attention('ring', 32, 4, [8, 16], [1, 2], {})",
            "create_dilated_attention('improved', [8, 16], [1, 2], {})",
            "create_dilated_attention('ring', [8, 16], [1, 2], {})",
            "ImprovedMultiheadDilatedAttention(32, 4, [1, 2], [8, 16], {})",
            "RingMultiheadDilatedAttentionHybrid(32, 4, [8, 16], [1, 2], {})",
            "MultiheadDilatedAttention(32, 4, [1, 2], [8, 16], {})",
            "DilatedAttention([8, 16], [1, 2], {})",
            "DilatedTransformerEncoderLayer(32, 4, [8, 16], [1, 2], {})",
        ],
    )
    def test_every_call_of_0_2_takes_what_means_nothing(self, call: str, name: str) -> None:
        take_class = call.partition("(")[0]
        names, caught = as_user(f"from {NAME} import {take_class}\n\nmade = {call.format(f'{name}=True')}\n")
        assert isinstance(names["made"], nn.Module)
        assert any(name in str(w.message) and "ignore" in str(w.message) for w in caught), caught

    def test_names_that_never_were(self) -> None:
        with pytest.raises(AttributeError, match=r"^module 'dilated_attention_pytorch' has no attribute 'nonsense'$"):
            package.nonsense  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
            as_user(f"from {NAME}.dilated_attention import Nonsense")


@pytest.mark.parametrize("place", [x for x in OLD_MODULES if x != "dilated_attention" and "." not in x])
def test_old_modules_are_attributes_of_the_package(place: str) -> None:
    names, caught = as_user(f"import {NAME} as p\n\nmodule = p.{place}\n")
    assert names["module"] is sys.modules[f"{NAME}.{place}"]
    assert [(w.category, w.filename, w.lineno) for w in caught] == [(DeprecationWarning, "user_script.py", 3)]


class TestPlaces:
    """Old module paths are files in a folder that the package's `__path__` names."""

    @pytest.mark.parametrize("place", OLD_MODULES)
    def test_find_spec_finds_the_file_and_does_not_warn(self, place: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec = importlib.util.find_spec(f"{NAME}.{place}")
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).relative_to(Path(package.__file__).parent / "_old" / "places")

    def test_pkgutil_lists_them(self) -> None:
        listed = {module.name for module in pkgutil.iter_modules(package.__path__)}
        ring = {f"ring_attention.{module.name}" for module in pkgutil.iter_modules(package.ring_attention.__path__)}
        assert set(OLD_MODULES) <= listed | ring

    @pytest.mark.parametrize(("place", "name"), ALL)
    def test_a_pickle_finds_what_it_names(self, place: str, name: str) -> None:
        module = f"{NAME}.{place}" if place else NAME
        with warnings.catch_warnings(action="ignore"):
            assert pickle.loads(f"c{module}\n{name}\n.".encode()) is take(place, name)

    def test_an_archive_holds_them_too(self, tmp_path: Path) -> None:
        shutil.make_archive(str(tmp_path / "package"), "zip", Path(package.__file__).parents[1], NAME)
        code = (
            f"import {NAME}.long_net as a, {NAME}.ring_attention.production_hilbert as b\n"
            "print(a.__file__, b.__file__, a.LongNet.__name__, b.RingDilatedAttentionHilbert.__name__)"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "package.zip")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("package.zip") == 2 and "LongNet RingDilatedAttentionHilbert" in done.stdout


GONE_MODULES = (
    "block_sparse_adaptive block_sparse_hierarchical block_sparse_optimized block_sparse_ring_dilated_attention "
    "block_sparse_ring_distributed_dilated_attention block_sparse_ring_multihead_dilated_attention "
    "block_sparse_torch_sparse core.base core.bucketed_memory_pool core.config core.constants "
    "core.enhanced_memory_pool core.factory core.fragment_aware_pool core.memory_pool core.memory_profiler "
    "core.memory_visualizer core.numa_aware_pool core.optimized_pattern_cache core.pattern_cache core.simple_gpu_cache "
    "distributed_dilated_attention transformer_refactored utils utils.attention_utils utils.flash_attention_3_utils "
    "utils.flash_attention_utils utils.gpu_utils utils.return_standardizer utils.sparse_pattern_utils utils.validation "
    "base base.dilated_attention ring.factory ring.hilbert sparse.block_sparse_attention models.long_net "
    "ring_attention_autograd ring_dilated_attention_refactored ring_dilated_attention_sdpa hilbert_attention_v2 "
    "kernels.hilbert_attention_core improved_dilated_attention_v2 dynamic_dilated_attention "
    "head_parallel_dilated_attention"
)


class TestGone:
    """Old module paths and names that nothing stands for: the error says why, whichever way they are imported."""

    @pytest.mark.parametrize("place", GONE_MODULES.split())
    def test_modules(self, place: str) -> None:
        reason = r"0\.2's \w+ (has gone|is not dilated attention).*migration\.md"
        owner, _, name = f"{NAME}.{place}".rpartition(".")
        if "." not in place:
            assert importlib.util.find_spec(f"{NAME}.{place}") is None
        for statement in (
            f"import {NAME}.{place}",
            f"from {owner} import {name}",
            f"from {NAME}.{place} import any_name",
        ):
            with pytest.raises(ModuleNotFoundError, match=reason):
                as_user(statement)

    @pytest.mark.parametrize(
        "name", ["BlockSparseAdaptive", "create_block_sparse_attention", "RingMultiheadDilatedAttention", "utils"]
    )
    def test_names(self, name: str) -> None:
        with pytest.raises(ImportError, match=f"0.2's {name} "):
            as_user(f"from {NAME} import {name}")
        assert not hasattr(package, name)
        with pytest.raises(ImportError, match=r"0\.2's MemoryPool has gone; UnifiedMemoryPool took the place"):
            as_user(f"from {NAME}.core import MemoryPool")

    def test_what_never_was_is_pythons_own_error(self) -> None:
        with pytest.raises(ModuleNotFoundError, match=rf"^No module named '{NAME}\.nonsense'$"):
            as_user(f"import {NAME}.nonsense")
        with pytest.raises(ImportError, match=r"^cannot import name 'nonsense'"):
            as_user(f"from {NAME} import nonsense")
        with pytest.raises(ModuleNotFoundError, match=r"^No module named 'utils_of_mine'$"):
            as_user("import utils_of_mine")
        assert importlib.util.find_spec(f"{NAME}.nonsense") is None


class TestMembers:
    """What 0.2's modules told of themselves."""

    @pytest.mark.parametrize(
        ("place", "name"), [(place, name) for place, name in ROWS if "Ring" in name and name != "RingAttentionConfig"]
    )
    def test_rings(self, place: str, name: str) -> None:
        ring, _, _ = build(place, name)
        if place == "ring_attention.production_hilbert":  # a path that was promised for 0.3: the class of today
            return
        assert (ring.mode, ring.ring_size, ring.num_groups) == ("single", 1, 2)
        assert ring.get_memory_stats()["cached_indices"] == 0
        ring.clear_caches()
        if list(ring.parameters()):
            assert ring.head_dim == 8

    @pytest.mark.parametrize("name", ["ImprovedDilatedAttention", "ImprovedMultiheadDilatedAttention"])
    def test_modules(self, name: str) -> None:
        module, _, _ = build("", name)
        assert module.num_groups == 2
        if name == "ImprovedMultiheadDilatedAttention":
            assert module.head_dim == 8

    def test_configurations(self) -> None:
        assert take("core", "DilatedAttentionConfig")(**PATTERN).num_groups == 2
        assert take("core", "MultiheadConfig")(32, 4).head_dim == 8

    def test_the_third_ring_returns_a_tensor_and_its_hybrid_a_pair(self) -> None:
        third, x = take("", "RingMultiheadDilatedAttentionV3")(32, 4, [8, 16], [1, 2]), torch.randn(1, 32, 32)
        hybrid = take("", "create_ring_multihead_attention_hybrid")(32, 4, [8, 16], [1, 2], dropout=0.0)
        hybrid.load_state_dict(third.state_dict())
        assert third.inner_attn_ln is None
        assert torch.equal(third(x, x, x, is_causal=True), hybrid(x, x, x, is_causal=True)[0])
        with pytest.raises(ValueError, match="expected batch_first to be True"):
            take("", "RingMultiheadDilatedAttentionV3")(32, 4, [8], [1], batch_first=False)


def test_the_warning_of_the_hilbert_ring_names_both_successors() -> None:
    _, caught = as_user(f"from {NAME} import RingDilatedAttentionHilbertOptimized\n")
    message = str(caught[0].message)
    assert f"it is now {NAME}.RingDilatedAttentionHilbert (" in message and "HilbertRingAttention takes" in message


@pytest.mark.parametrize("name", BY_PLACE["dilated_attention"])
def test_the_function_has_the_names_of_the_old_module(name: str) -> None:
    names, caught = as_user(f"import {NAME}.dilated_attention as m\n\nmade = m.{name}(*{{}})\n".format(
        (32, 4, [1], [8]) if "Multihead" in name else ([8], [1])
    ))  # fmt: skip
    assert isinstance(names["made"], successor("dilated_attention", name))
    assert [(w.category, w.filename, w.lineno) for w in caught] == [(DeprecationWarning, "user_script.py", 3)]


def test_subclasses_and_isinstance() -> None:
    """What users did with the old classes."""
    old = take("", "RingDilatedAttentionV2")

    class Mine(old):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__([8, 16], [1, 2], dropout=0.25)

    assert isinstance(Mine(), old) and isinstance(Mine(), package.RingDilatedAttention)
    assert Mine().config.dropout == 0.25


def fresh(*scripts: str) -> list[str]:
    """What each script prints, each in its own process forked from one that has imported torch alone."""
    # One interpreter imports torch once, for all of them: the package itself is imported in each fork.
    parent = (
        "import os, sys, torch\n"
        f"for i, script in enumerate({list(scripts)!r}):\n"
        "    sys.stdout.flush()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        code = 1\n"
        "        try:\n"
        "            exec(compile(script, f'script_{i}.py', 'exec'), {'__name__': '__main__'})\n"
        "            code = 0\n"
        "        except BaseException:\n"
        "            import traceback; traceback.print_exc()\n"
        "        sys.stdout.flush(); sys.stderr.flush()\n"
        "        os._exit(code)\n"
        "    assert os.waitpid(pid, 0)[1] == 0, f'script {i} failed'\n"
        "    print('----', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", parent], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("----\n")[:-1]


FUNCTION = f"from {NAME} import dilated_attention"
CLASS = f"from {NAME}.dilated_attention import DilatedAttention, MultiheadDilatedAttention"
HOLDS = f"""
import importlib, inspect, pickle, sys
import {NAME} as package
assert inspect.isfunction(package.dilated_attention)
module = sys.modules["{NAME}.dilated_attention"]
assert inspect.ismodule(module) and importlib.import_module("{NAME}.dilated_attention") is module
assert issubclass(module.DilatedAttention, package.DilatedAttention)
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_module_and_the_function_of_one_name() -> None:
    scripts = [
        f"{FUNCTION}\n{CLASS}\nassert callable(dilated_attention)\n{HOLDS}",
        f"{CLASS}\n{FUNCTION}\nassert DilatedAttention([8], [1]) is not None\n{HOLDS}",
        f"import {NAME}.dilated_attention\n{HOLDS}",
        # Python takes the package's attribute here, which is the function, and that has the names as well.
        f"import {NAME}.dilated_attention as m\nassert m.DilatedAttention([8], [1])\n{FUNCTION}\n"
        f"assert m is dilated_attention\n{HOLDS}",
        f"import {NAME}\n{NAME}.dilated_attention.MultiheadDilatedAttention(8, 1, [1], [8])\n{HOLDS}",
        f"{CLASS}\n{HOLDS}\nimportlib.reload(module)\n{FUNCTION}\n{CLASS}\n{HOLDS}",
        f"{FUNCTION}\n{HOLDS}\nimportlib.reload(package)\n{FUNCTION}\n{CLASS}\n{HOLDS}",
        f"{CLASS}\n{FUNCTION}\n{HOLDS}\n"
        "assert pickle.loads(pickle.dumps(dilated_attention)) is dilated_attention\n"
        "assert pickle.loads(pickle.dumps(DilatedAttention)) is DilatedAttention\n"
        "print(pickle.loads(pickle.dumps(DilatedAttention([8], [1]))).segment_lengths)\n",
        # Each old module by itself, first thing in a process.
        *(f"import {NAME}.{place}\n{HOLDS}" for place in OLD_MODULES),
        # The package loads neither Triton nor the models, rings and factories behind its old names.
        f"import {NAME}, sys\nloaded = [m for m in sys.modules if m.startswith(('triton', '{NAME}.models', "
        f"'{NAME}.ring_attention', '{NAME}._old.ring', '{NAME}._old.models'))]\nassert not loaded, loaded\nprint('ok')",
    ]
    for printed in fresh(*scripts):
        assert "ok" in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_warning_as_python_shows_it(tmp_path: Path) -> None:
    """By default Python shows a DeprecationWarning only where it points into `__main__`."""
    script = tmp_path / "train.py"
    script.write_text(f"import os\nfrom {NAME}.long_net import LongNet\n\nprint(LongNet.__name__)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "LongNet\n"
    assert f"{script}:2: DeprecationWarning: the module {NAME}.long_net is deprecated" in done.stderr
    assert done.stderr.count("Warning") == 1


README_02 = """
import torch
from dilated_attention_pytorch import create_dilated_attention, create_multihead_dilated_attention
from dilated_attention_pytorch.core import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_pytorch.dilated_attention import DilatedAttention
from dilated_attention_pytorch.long_net import LongNet, LongNetLM
from dilated_attention_pytorch.multihead_dilated_attention import MultiheadDilatedAttention
from dilated_attention_pytorch import (
    ImprovedDilatedAttention, RingAttentionConfig, RingDilatedAttention, RingDilatedAttentionProduction,
    RingDilatedAttentionV2Collective, create_production_ring_attention,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
pattern = dict(segment_lengths=[64, 128, 256], dilation_rates=[1, 2, 4])

attention = create_multihead_dilated_attention(
    "auto", embed_dim=64, num_heads=4, dropout=0.1, device=device, dtype=dtype, **pattern
)
x = torch.randn(2, 256, 64, device=device, dtype=dtype)
output = attention(x, x, x, is_causal=True)
print(output[0].shape)

dilated_attention = create_dilated_attention("improved", **pattern)
query = torch.randn(1, 256, 8, 16, device=device, dtype=dtype)
key = torch.randn(1, 256, 8, 16, device=device, dtype=dtype)
value = torch.randn(1, 256, 8, 16, device=device, dtype=dtype)
print(dilated_attention(query, key, value, is_causal=False).shape)

dilated_attention = DilatedAttention(**pattern)
print(dilated_attention(query, key, value, is_causal=False).shape)

mhda = MultiheadDilatedAttention(embed_dim=64, num_heads=8, device=device, dtype=dtype, **pattern)
y = mhda(x, x, x, is_causal=False)
print(y.shape)

attention_config = DilatedAttentionConfig(dropout=0.1, **pattern)
multihead_config = MultiheadConfig(embed_dim=64, num_heads=4, bias=True, layer_norm=True, gamma_init=1.0)
attention = create_multihead_dilated_attention(
    "improved", multihead_config=multihead_config, attention_config=attention_config
)

net = LongNet(d_model=64, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64, dropout=0.0,
              activation="relu", layer_norm_eps=1e-5, device=device, dtype=dtype, **pattern)
with torch.no_grad():
    y = net.forward(torch.randn(1, 256, 64, device=device, dtype=dtype), is_causal=True)
print(y.shape)

num_tokens = 100
lm = LongNetLM(num_tokens=num_tokens, d_model=64, nhead=4, num_encoder_layers=1, num_decoder_layers=1,
               dim_feedforward=64, dropout=0.0, activation="relu", layer_norm_eps=1e-5, device=device, dtype=dtype,
               **pattern)
tokens = torch.randint(0, num_tokens, (1, 256), device=device, dtype=torch.long)
with torch.no_grad():
    y = lm.forward(tokens, is_causal=True)
print(y.shape)

config = RingAttentionConfig(dropout=0.1, ring_size=1, use_gradient_checkpointing=True, use_memory_pool=True,
                             mixed_precision=False, **pattern)
ring = RingDilatedAttentionProduction(config)
loss = ring(query.requires_grad_(), key, value, is_causal=True).sum()
loss.backward()
print(query.grad.shape)
for ring in (
    create_production_ring_attention(**pattern, enable_error_recovery=True),
    RingDilatedAttention(**pattern, ring_size=1, enable_memory_pool=True),
    RingDilatedAttentionV2Collective(**pattern, device=device, dtype=dtype, use_flash_attention=False),
):
    print(ring(query, key, value).shape)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_script_in_the_style_of_the_0_2_readme_runs_unchanged() -> None:
    (printed,) = fresh(README_02)
    attended = "torch.Size([1, 256, 8, 16])"
    assert printed.splitlines() == [
        "torch.Size([2, 256, 64])", attended, attended, "torch.Size([2, 256, 64])", "torch.Size([1, 256, 64])",
        "torch.Size([1, 256, 100])", attended, attended, attended, attended,
    ]  # fmt: skip


class TestExpectationsOfTheOldTests:
    """What the old tests asked for and was no bug: shapes, errors, lengths that were refused for no good reason."""

    @pytest.mark.parametrize("segment_lengths", [(4,), (2, 4, 8), (2, 4)])
    @pytest.mark.parametrize("dilation_rates", [(1,), (1, 2, 4)])
    @pytest.mark.parametrize("num_heads", [4, 8])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_attention(
        self, segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...], num_heads: int, is_causal: bool
    ) -> None:
        old = take("dilated_attention", "DilatedAttention")
        multihead = take("dilated_attention", "MultiheadDilatedAttention")
        if len(segment_lengths) != len(dilation_rates):
            with pytest.raises(ValueError, match="of equal length"):
                old(segment_lengths, dilation_rates)
            with pytest.raises(ValueError, match="of equal length"):
                multihead(32, num_heads, dilation_rates, segment_lengths)
            return
        x = torch.randn(1, 16, num_heads, 32)
        assert old(segment_lengths, dilation_rates)(x, x, x, is_causal=is_causal).shape == x.shape
        x = torch.randn(1, 16, 64)
        out, weights = multihead(64, num_heads, dilation_rates, segment_lengths)(x, x, x, is_causal=is_causal)
        assert out.shape == x.shape and weights is None

    @pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.relu, nn.functional.gelu])
    @pytest.mark.parametrize("segment_lengths", [(4,), (4, 8, 16)])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_models(self, activation: Any, segment_lengths: tuple[int, ...], is_causal: bool) -> None:
        options: dict[str, Any] = {
            "d_model": 32, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16,
            "segment_lengths": segment_lengths, "dilation_rates": [w // 4 for w in segment_lengths], "dropout": 0.0,
            "activation": activation, "dtype": torch.float32,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net, lm = take("long_net", "LongNet")(**options), take("long_net", "LongNetLM")(num_tokens=50, **options)
        x = torch.randn(1, 16, 32)
        assert net.forward(x, is_causal=is_causal).shape == x.shape
        assert lm.forward(torch.randint(0, 50, (1, 16)), is_causal=is_causal).shape == (1, 16, 50)

    @pytest.mark.parametrize(
        ("lengths", "rates", "dropout"), [([], [], 0.0), ([-8], [1], 0.0), ([8], [0], 0.0), ([8], [1], 1.5)]
    )
    def test_constructor_errors(self, lengths: list[int], rates: list[int], dropout: float) -> None:
        for name in ("ImprovedDilatedAttention", "RingDilatedAttentionV2"):
            with pytest.raises(ValueError, match="expected"):
                take("", name)(lengths, rates, dropout)

    def test_forward_errors(self) -> None:
        old = take("", "ImprovedDilatedAttention")([8], [1])
        q = torch.randn(1, 16, 4, 8)
        with pytest.raises(ValueError, match=r"expected q of shape \(B, N, H, D\)"):
            old(q[0], q[0], q[0])
        with pytest.raises(ValueError, match="one shape"):
            old(q, q, q[:, :8])
        multihead = take("multihead_dilated_attention", "MultiheadDilatedAttention")(32, 4, [1], [8])
        with pytest.raises(ValueError, match="expected query of shape"):
            multihead(torch.randn(1, 16, 31))

    @pytest.mark.parametrize("length", [1, 7, 16, 23])
    def test_lengths_that_do_not_divide_are_no_error_now(self, length: int) -> None:
        q = torch.randn(1, length, 4, 8)
        assert take("", "ImprovedDilatedAttention")([8, 16], [1, 4])(q, q, q, True).shape == q.shape

    def test_factory_defaults(self) -> None:
        made = take("", "create_dilated_attention")()
        assert (made.segment_lengths, made.dilation_rates) == ((2048, 4096, 8192), (1, 2, 4))
        made = take("", "create_multihead_dilated_attention")()
        assert (made.embed_dim, made.num_heads) == (768, 12)


def test_module_type_of_old_places() -> None:
    """`dir` and `hasattr` tell what an old module has, and do not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = sys.modules[f"{NAME}.dilated_attention"]
        assert isinstance(module, types.ModuleType)
        assert dir(module) == ["DilatedAttention", "MultiheadDilatedAttention", "create_dilated_attention"]
        assert not hasattr(module, "absent")
