# It shares its name with the function. The package imports it before it binds the function, so that neither import can
# put one in the place of the other; hence it warns when a name is taken from it, not while it is imported.
from dilated_attention_pytorch._old.names import old_module

__getattr__, __dir__ = old_module(__name__, warn_now=False)
