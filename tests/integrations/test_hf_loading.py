"""Loading says what a model is: a config with a pattern loads dilated, unless another attention is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hf_models import LENGTHS, PATTERN, RATES, make, tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dilated_attention_pytorch.integrations.transformers import register, use_dilated_attention

register()
X = tokens(1, 120)


def saved(tmp_path: Path) -> Any:
    model = make("llama", "sdpa", dilated_segment_lengths=None)
    use_dilated_attention(model, LENGTHS, RATES)
    model.save_pretrained(tmp_path)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.double().eval()(X).logits
    return out


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "dilated"
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        again = load(tmp_path)
        assert again.config._attn_implementation == "dilated"
        assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(model))


def test_fields_alone_are_enough(tmp_path: Path) -> None:
    """As configs saved by 0.3's first users have it: a pattern, and no attention named."""
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attn_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert (
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).config._attn_implementation == "dilated"
    )


def test_another_attention_asked_for_is_obeyed(tmp_path: Path) -> None:
    model = saved(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(logits(dense), logits(make("llama", "sdpa")))
    # And kept: what is saved is what it is.
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path / "eager")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "eager").config._attn_implementation == "eager"
    model.set_attn_implementation("dilated")
    model.save_pretrained(tmp_path / "back")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config._attn_implementation == "dilated"


def test_configs_without_a_pattern_are_left_alone(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1)
    assert config._attn_implementation is None and "attn_implementation" not in config.to_dict()
    assert LlamaConfig(**PATTERN)._attn_implementation == "dilated"


def test_without_this_library_it_is_refused(tmp_path: Path) -> None:
    """transformers alone knows no attention of that name, and says so."""
    saved(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode and 'Specified `attn_implementation="dilated"` is not supported' in done.stderr


def test_a_model_of_several_parts(tmp_path: Path) -> None:
    """Its language model alone, by that part; the whole is saved and loaded with it."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    text = make("llama", "sdpa", dilated_segment_lengths=None).config.to_dict()
    config = transformers.LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"}, text_config=text, image_token_index=98,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    use_dilated_attention(model.model.language_model, LENGTHS, RATES)
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config._attn_implementation == "dilated"
    assert again.model.vision_tower.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again), logits(model))


# peft asks transformers for a name that it has given up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_load_on_the_base_that_they_were_trained_on(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.base_model.model.config._attn_implementation == "dilated"
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.equal(logits(again), logits(base))


def test_transformers_4_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.57.1'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import dilated_attention_pytorch.integrations.transformers\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "found 4.57.1" in done.stdout
