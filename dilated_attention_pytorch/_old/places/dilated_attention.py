# It shares its name with the function. The package imports it before it binds the function, so that neither import can
# put one in the place of the other; hence it warns when a name is taken from it, not while it is imported.
__getattr__, __dir__ = __import__("dilated_attention_pytorch._old.names", fromlist=["old_module"]).old_module(__name__)
