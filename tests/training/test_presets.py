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


def test_the_demo_computes_with_one_thread():
    """How many threads share a sum decides its last bits: with one the demo ends alike on every machine of a kind."""
    assert preset("demo").cpu_threads == 1
