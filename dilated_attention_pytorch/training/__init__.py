"""Training a byte-level LongNet language model on a folder of text, exactly resumable, on one device or many."""

from dilated_attention_pytorch.training.config import PRESETS, TrainConfig, preset
from dilated_attention_pytorch.training.corpus import (
    Corpus,
    build_corpus,
    standard_library,
    training_excerpts,
    validation_excerpts,
)
from dilated_attention_pytorch.training.evaluate import Evaluation, byte_stream, evaluate, write_text
from dilated_attention_pytorch.training.trainer import Interrupted, Reporter, Result, Trainer

__all__ = ["PRESETS", "Interrupted", "Reporter", "Result", "TrainConfig", "Trainer", "preset"]
__all__ += ["Corpus", "build_corpus", "validation_excerpts", "standard_library", "training_excerpts"]
__all__ += ["Evaluation", "byte_stream", "evaluate", "write_text"]
