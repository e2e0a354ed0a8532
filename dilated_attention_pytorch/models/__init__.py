"""LongNet (arXiv 2307.02486) and the models built on it."""

from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.models.checkpoint import load_pretrained, save_pretrained
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.convert import Conversion, convert
from dilated_attention_pytorch.models.generation import left_pad
from dilated_attention_pytorch.models.longnet import LongNet, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models.longvit import LongViT, LongViTConfig
from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig, slide_segment_lengths
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder, SlideOutput

# By what they are for: language models, images, weights.
__all__ = ["KeyValueCache", "LongNet", "LongNetConfig", "LongNetEncoder", "LongNetLM", "left_pad"]
__all__ += ["LongViT", "LongViTConfig", "SlideEncoder", "SlideEncoderConfig", "SlideOutput", "slide_segment_lengths"]
__all__ += ["Conversion", "convert", "load_pretrained", "save_pretrained"]
