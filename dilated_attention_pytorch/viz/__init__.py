"""Pictures and pages of patterns and runs, with matplotlib (`pip install 'dilated-attention-pytorch[viz]'`)."""

from dilated_attention_pytorch.viz.curves import loss_figure
from dilated_attention_pytorch.viz.orders import heat_figure, neighbourhood_figure, orders_figure, slide_figure
from dilated_attention_pytorch.viz.page import save_page
from dilated_attention_pytorch.viz.pattern import (
    multiplicity,
    neighbours_figure,
    pattern_figure,
    receptive_field,
    receptive_figure,
)
from dilated_attention_pytorch.viz.style import save

__all__ = ["multiplicity", "neighbours_figure", "pattern_figure", "receptive_field", "receptive_figure"]
__all__ += ["heat_figure", "loss_figure", "neighbourhood_figure", "orders_figure", "save", "save_page"]
__all__ += ["slide_figure"]
