from dilated_attention_pytorch._old.names import old_module

__getattr__, __dir__ = old_module(__name__)
