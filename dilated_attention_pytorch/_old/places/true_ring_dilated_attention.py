__getattr__, __dir__ = __import__("dilated_attention_pytorch._old.names", fromlist=["old_module"]).old_module(__name__)
