"""Classes of the installed transformers: what they were under one covering branch, or refused, and nothing in between.

All of them, against the record in docs/huggingface_classes.json, which `make hf-sweep` writes; a new release of
transformers is covered as it is.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

transformers = pytest.importorskip("transformers")

DOCS = Path(__file__).parents[2] / "docs"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("huggingface_classes", DOCS / "huggingface_classes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SWEEP = load()
KNOWN: dict[str, str] = SWEEP.classes()
RECORD = json.loads(SWEEP.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_equal_or_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = SWEEP.verdict(name, KNOWN[name])
    assert not found.startswith("WRONG"), found
    # What runs depends on what else is installed; what ran once does so again.
    kept = RECORD["classes"].get(name, "not run")
    if transformers.__version__ == RECORD["transformers"] and not kept.startswith("not run"):
        assert found == kept, "run `make hf-sweep`"


def test_the_record_is_of_classes_that_ran() -> None:
    """A guard that builds nothing is green as well."""
    kinds = [found.partition(":")[0] for found in RECORD["classes"].values()]
    assert kinds.count("equal") >= 300 and kinds.count("refused") >= 50 and "WRONG" not in kinds


def test_a_wrong_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder taken for a decoder, as Splinter once was."""
    from dilated_attention_pytorch.integrations.transformers import layers

    right = layers.Form.read
    monkeypatch.setattr(layers.Form, "read", lambda mask, queries: right(mask, queries)._replace(is_causal=True))
    assert SWEEP.verdict("SplinterModel", "splinter").startswith("WRONG: off by")
