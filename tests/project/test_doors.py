"""The doors of README: from its own commands to a first result, on small inputs and without a network.

What stands in README is run as it stands, but for the name of the model and, since the corpus here is small, further
options of `train`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import slide_files as write
import torch
from command import call
from test_docs import Block, blocks, commands

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MOST_COMMANDS, MOST_LINES = 3, 10
SMALL = (
    "steps=3", "warmup_steps=1", "eval_every=3", "eval_excerpts=2", "cpu_threads=0", "d_model=32", "num_layers=1",
    "dim_feedforward=32", "context=64", "segment_lengths=16,64", "dilation_rates=1,2",
)  # fmt: skip


def door(name: str) -> Block:
    """The first block after a door's name."""
    return blocks(README[README.index(f"**{name}**") :])[0]


def run(name: str) -> list[tuple[list[str], str]]:
    """The words of each command of a door but pip's, which a test of the wheel runs, and what it printed."""
    found = [words for _, words in commands(door(name))]
    assert 1 <= len(found) <= MOST_COMMANDS, found
    ours = [words[1:] for words in found if words[0] == "dilated-attention"]
    assert len(ours) + sum(words[:2] == ["pip", "install"] for words in found) == len(found), found
    more = {"train": [part for setting in SMALL for part in ("--set", setting)], "slide": ["--device", "cpu"]}
    return [(words, call(*words, *more.get(words[0], []))) for words in ours]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_model_of_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "Once", "upon", "a", "time", "there", "was", "an", "end", "of", "all"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained("tiny")
    source = door("A model of Hugging Face").source
    lines = [line for line in source.splitlines() if line]
    assert len(lines) <= MOST_LINES
    name = "HuggingFaceTB/SmolLM2-135M"
    assert source.count(name) == 1
    names: dict[str, object] = {}
    exec(compile(source.replace(name, "tiny"), "README.md", "exec"), names)
    text = capsys.readouterr().out
    assert text.startswith("Once upon a time") and set(text.removeprefix("Once upon a time").split()) <= {*words}
    assert names["write"].model.config.dilated_segment_lengths == [1024, 4096]  # type: ignore[attr-defined]


def test_a_folder_of_slides() -> None:
    encoder = write.checkpoint(Path("made"), num_heads=16, segment_lengths=(1024, 5792, 32768, 185363, 1048576),
                               dilation_rates=(1, 2, 4, 8, 16))  # fmt: skip
    torch.save({"model": encoder.state_dict()}, "slide_encoder.pth")
    Path("features").mkdir()
    for count in (30, 50):
        write.trident(
            Path("features", f"s{count}.h5"), write.features(count), write.tissue(count) * 512, magnification=40
        )
    ((_, printed),) = run("A folder of slides")
    assert "2 slides written" in printed and "0 have no result" in printed
    assert {path.name for path in Path("embeddings").glob("*.h5")} == {"s30.h5", "s50.h5"}


def test_a_corpus() -> None:
    Path("corpus").mkdir()
    for i in range(60):
        Path("corpus", f"{i}.txt").write_text(f"Once there was text number {i}.\n" * 20)
    (_, trained), (words, printed) = run("A corpus")
    assert "bits per byte" in trained
    assert words[1] == "runs/corpus" and printed.startswith(words[words.index("--prompt") + 1])
    assert len(printed) > 20 and Path("runs/corpus/model.safetensors").is_file()
