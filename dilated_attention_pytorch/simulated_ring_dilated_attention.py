"""An old place, until 0.4.0: `_deprecated.TABLE` says where its names are now."""

from dilated_attention_pytorch._deprecated import old_module

__getattr__, __dir__ = old_module(__name__)
