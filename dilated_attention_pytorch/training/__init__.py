"""Training a LongNet language model on text, exactly resumable, on one device or many."""

from dilated_attention_pytorch.training.config import PRESETS, TrainConfig, preset, read_settings
from dilated_attention_pytorch.training.corpus import Corpus, build_corpus
from dilated_attention_pytorch.training.evaluate import Evaluation, evaluate, text_stream
from dilated_attention_pytorch.training.excerpts import training_excerpts, validation_excerpts
from dilated_attention_pytorch.training.sources import standard_library
from dilated_attention_pytorch.training.trainer import Interrupted, Result, Trainer

__all__ = ["PRESETS", "Interrupted", "Result", "TrainConfig", "Trainer", "preset", "read_settings"]
__all__ += ["Corpus", "build_corpus", "validation_excerpts", "standard_library", "training_excerpts"]
__all__ += ["Evaluation", "evaluate", "text_stream"]
