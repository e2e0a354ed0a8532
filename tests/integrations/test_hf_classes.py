"""Classes of the installed transformers: what they were under one covering branch, or refused, and nothing in between.

A sample by default: those that once were wrong or are unusual, and every twentieth. `make hf-sweep` runs all of them
and writes what it finds to docs/huggingface_classes.json; a new release of transformers is covered by running it.
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
# Windows, chunks and prefixes; encoders and decoders; latent attention; own masks; sinks, caps and biases.
UNUSUAL = (
    "AlignTextModel", "BartModel", "BertModel", "BigBirdPegasusModel", "CLIPModel", "CLIPSegModel", "ClapModel",
    "DeepseekV3ForCausalLM", "DeepseekV4Model", "DogeModel", "Gemma2Model", "Gemma3ForCausalLM", "GPTBigCodeModel",
    "GitModel", "GptOssForCausalLM", "LayoutLMModel", "Llama4ForCausalLM", "LlamaForCausalLM", "MarianModel",
    "MarkupLMModel", "MiMoV2FlashModel", "MistralForCausalLM", "MllamaModel", "ModernBertModel", "MoshiModel",
    "NllbMoeModel", "PaliGemmaModel", "PegasusXModel", "PersimmonModel", "PhimoeModel", "Qwen2MoeForCausalLM",
    "SiglipModel", "SplinterModel", "T5Gemma2Model", "T5GemmaModel", "T5Model", "VaultGemmaModel", "ViTModel",
    "Wav2Vec2ConformerModel", "WhisperModel",
)  # fmt: skip


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
# Those that ran when the record was made come round by number; a class that is newer than the record always does.
RAN = [name for name in KNOWN if not RECORD["classes"].get(name, "").startswith("not run")]
SAMPLE = sorted({*UNUSUAL, *RAN[::20], *(set(KNOWN) - set(RECORD["classes"]))} & set(KNOWN))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_equal_or_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = SWEEP.verdict(name, KNOWN[name])
    assert not found.startswith("WRONG"), found
    if transformers.__version__ == RECORD["transformers"]:
        assert found == RECORD["classes"][name], "run `make hf-sweep`"


def test_the_sample_is_a_sample_of_what_runs() -> None:
    """A guard that builds nothing is green as well."""
    kinds = [RECORD["classes"].get(name, "").partition(":")[0] for name in UNUSUAL if name in KNOWN]
    assert len(kinds) >= 35 and kinds.count("not run") <= 5, dict(zip(UNUSUAL, kinds, strict=False))
    assert kinds.count("equal") >= 15 and kinds.count("refused") >= 8
    assert not [name for name, found in RECORD["classes"].items() if found.startswith("WRONG")]


def test_a_wrong_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder taken for a decoder, as Splinter once was."""
    from dilated_attention_pytorch.integrations.transformers import layers

    right = layers.Form.read
    monkeypatch.setattr(layers.Form, "read", lambda mask, queries: right(mask, queries)._replace(is_causal=True))
    assert SWEEP.verdict("SplinterModel", "splinter").startswith("WRONG: off by")
