"""What models do with a context that is longer than what can reach it: they say so, and a shift or longer segments
carry information across the border. Shifted models decode with a cache as they compute whole sequences."""

import pytest
import torch

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.models import LongNetConfig, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models import reach as models_reach
from dilated_attention_pytorch.models.reach import out_of_reach

SHAPE = {"vocab_size": 64, "d_model": 32, "nhead": 4, "num_decoder_layers": 4, "dim_feedforward": 64}
SHORT = {"segment_lengths": [64, 256], "dilation_rates": [1, 4]}
LONGER = "the context of 257 positions is longer than what can reach it"


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(models_reach, "_warned", set())


def two_prompts():
    """Token 256 is the same, what comes before differs everywhere."""
    first = torch.randint(64, (1, 257), generator=torch.Generator().manual_seed(0))
    second = (first + 1) % 64
    second[:, 256] = first[:, 256]
    return first, second


def logits_at_256(**changes):
    torch.manual_seed(0)
    model = LongNetLM(**SHAPE | SHORT | changes).double().eval()
    with torch.no_grad():
        return [model(prompt)[0, 256] for prompt in two_prompts()]


def test_a_border_that_nothing_crosses_is_warned_of():
    with pytest.warns(UserWarning, match=LONGER) as caught:
        first, second = logits_at_256()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(first, second)
    assert "--suggest 257" in str(caught[0].message) and "segment_shift='alternate'" in str(caught[0].message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"segment_shift": "alternate"},
        {"segment_shift": [0, 128, 64, 30]},
        {"segment_lengths": [64, 256, 512], "dilation_rates": [1, 4, 8]},
    ],
    ids=["alternate", "per layer", "geometric"],
)
def test_information_crosses_it_with_a_shift_or_longer_segments(changes):
    first, second = logits_at_256(**changes)
    assert (first - second).abs().max() > 1e-3


def test_generation_warns_before_the_first_token_and_once():
    model = LongNetLM(**SHAPE | SHORT)
    prompt = torch.zeros(1, 250, dtype=torch.int64)
    with pytest.warns(UserWarning, match="the context of 260 positions") as caught:
        stream = model.stream(prompt, 10)
        list(stream)
        model.generate(prompt, 12)
    assert len(caught) == 1


def test_encoders_ask_in_both_directions():
    model = LongNetEncoder(**{k: v for k, v in SHAPE.items() if k != "vocab_size"} | SHORT, num_encoder_layers=2)
    with pytest.warns(UserWarning, match="the context of 300 positions"):
        model(torch.zeros(1, 300, 32))


def test_the_message_has_the_numbers():
    pattern = DilatedPattern((64, 256), (1, 4), 4)
    message = out_of_reach(pattern, (0,) * 12, 1024)
    reach = pattern.reach(12, 1024)
    assert f"{reach.best} positions away, half of them on none more than {reach.median} away" in message
    assert out_of_reach(pattern, (0, 128) * 8, 1024) is None
    assert out_of_reach(pattern, (0,), 2**40) is not None  # asked of as many positions as can be looked at


@pytest.mark.parametrize("shift", [5, 16, 32, "alternate", [0, 24, 7]])
@pytest.mark.parametrize("lengths", [(8, 16, 64), (5, 12, 40)], ids=["nested", "not nested"])
@pytest.mark.parametrize("positions", ["rotary", None])
def test_decoding_with_a_cache_equals_the_whole(shift, lengths, positions):
    torch.manual_seed(1)
    model = LongNetLM(
        **SHAPE | {"num_decoder_layers": 3, "positions": positions, "segment_shift": shift}, segment_lengths=lengths,
        dilation_rates=[1, 2, 4],
    ).double().eval()  # fmt: skip
    tokens = torch.randint(64, (2, 200))
    with torch.no_grad():
        want, cache, found = model(tokens), model.make_cache(), []
        for part in tokens.split([30, *[1] * 120, 17, *[1] * 33], 1):
            found.append(model(part, cache=cache))
            assert cache.rows_held <= max(lengths)
    assert (torch.cat(found, 1) - want).abs().max() <= 1e-10


@pytest.mark.parametrize("shift", [5, 32, "alternate"])
def test_left_padded_rows_are_decoded_as_each_alone(shift):
    torch.manual_seed(2)
    model = LongNetLM(
        **SHAPE | {"num_decoder_layers": 2, "segment_shift": shift}, segment_lengths=(8, 64), dilation_rates=[1, 2]
    ).double().eval()  # fmt: skip
    tokens, starts = torch.randint(64, (3, 100)), torch.tensor([0, 7, 50])
    with torch.no_grad():
        cache = model.make_cache(row_start=starts)
        found = torch.cat([model(part, cache=cache) for part in tokens.split([60, *[1] * 40], 1)], 1)
        for row, start in enumerate(starts.tolist()):
            alone = model(tokens[row : row + 1, start:])
            assert (found[row : row + 1, start:] - alone).abs().max() <= 1e-10


def test_configs_take_shifts_to_json_and_back():
    for shift in (0, 7, "alternate", (0, 16)):
        config = LongNetConfig(**SHAPE | SHORT | {"num_decoder_layers": 2, "segment_shift": shift})
        assert LongNetConfig.from_dict(config.to_dict()) == config
    assert LongNetConfig(segment_shift=[1, 2]).to_dict()["segment_shift"] == [1, 2]
    assert LongNetConfig(**SHORT, segment_shift="alternate").shifts(3) == (0, 128, 0)
    for shift, error in ((-1, ValueError), ("half", ValueError), (0.5, TypeError), ([], ValueError)):
        with pytest.raises(error, match="segment_shift"):
            LongNetConfig(segment_shift=shift)
    with pytest.raises(ValueError, match="expected segment_shift of one int per layer, 4, got 2"):
        LongNetLM(**SHAPE | {"segment_shift": [1, 2]})
    for shift in (3, "alternate", [0, 1]):
        with pytest.raises(ValueError, match="expected segment_shift=0 with padding='zero_keys'"):
            LongNetConfig(segment_shift=shift, padding="zero_keys")
