"""`python -m dilated_attention_pytorch.cli`: the same as `dilated-attention`."""

from dilated_attention_pytorch.cli import main

main()
