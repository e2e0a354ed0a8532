"""What every preset has in common: the shape of LongNet's transformer (arXiv 2307.02486, section 4.1)."""

import pytest

from dilated_attention_pytorch.training.config import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_paper_s_shape(name):
    config = preset(name)
    assert config is PRESETS[name] and config.dim_feedforward == 4 * config.d_model
    assert config.d_model == 64 * config.nhead
    assert max(config.segment_lengths) == config.context and sorted(config.segment_lengths) == [*config.segment_lengths]
    assert len(config.segment_lengths) == len(config.dilation_rates) and config.dilation_rates[0] == 1
