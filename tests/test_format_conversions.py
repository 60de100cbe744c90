"""fusedopt/formats.py: conversions between formats as tensors, and the checks of options and of states."""

import math

import pytest
import torch
from bounds import Bounded
from cases import assert_same_bits, bits, generator, hard_values, normal
from format_cases import BFLOAT16, BLOCK, FLOAT16, FLOAT32, assert_codes, code_step

from fusedopt import formats, specs

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PROPERTY = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ADAMW, LION = specs.RULES["adamw"], specs.RULES["lion"]
INT8, SPLITS = specs.STATE_FORMATS["int8"], {"split16": torch.int16, "split8": torch.int8}


# ---- split parameters ----------------------------------------------------------------------------------------------


def join(main, remainder):
    return formats.decode_master({"param_remainder": remainder}, main)


def split(value, name):
    """The bfloat16 half and the remainder of a float32 tensor."""
    entry, main = {"master_param": value}, torch.zeros_like(value, dtype=BFLOAT16)
    formats.convert_master(entry, main, specs.PARAM_FORMATS[name])
    assert entry.keys() == {"param_remainder"} and entry["param_remainder"].dtype == SPLITS[name]
    return main, entry["param_remainder"]


def assert_round_trip(main, remainder, name):
    """Same bits, or NaN for NaN. Returns how many of these there are."""
    value = join(main, remainder)
    again, low = split(value, name)
    nan = value.isnan()
    assert ((again.view(torch.int16) == main.view(torch.int16)) | nan).all()
    assert torch.equal(low, torch.where(nan, 0, remainder))
    assert torch.equal(again.isnan(), nan)
    return int(nan.sum())


def test_split8_round_trip_of_all_patterns(device):
    """All 2^24, among them inf, subnormals, -0, and every NaN, which stays NaN in the bfloat16 half."""
    pair, nans = torch.arange(2**20, dtype=torch.int32, device=device), 0
    for first in range(0, 2**24, 2**20):
        main = ((pair + first >> 8) - 2**15).to(torch.int16).view(BFLOAT16)
        nans += assert_round_trip(main, ((pair & 0xFF) - 2**7).to(torch.int8), "split8")
    assert nans == 2 * (2**15 - 1)


def test_split16_round_trip_of_many_patterns(device):
    """Random remainders, both ends and the middle of them, beside every bfloat16 number."""
    random = torch.randint(-(2**15), 2**15, (2**16, 16), generator=generator(1))
    ends = torch.tensor([-(2**15), 1 - 2**15, -1, 0, 1, 2**15 - 1]).expand(2**16, -1)
    remainder = torch.cat([random, ends], dim=1).to(device, torch.int16)
    main = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(BFLOAT16)
    assert assert_round_trip(main.view(-1, 1).expand(remainder.shape).contiguous(), remainder, "split16") > 2**11


def test_split_values_that_matter(device):
    """Largest numbers round up to infinity in the bfloat16 half and come back; subnormals and signs of zero stay."""
    largest, least = torch.finfo(FLOAT32).max, 2.0**-149
    value = torch.tensor([largest, -largest, math.inf, -math.inf, 0.0, -0.0, least, -least, 1.0, 1 + 2.0**-8, math.nan])
    value = value.to(device)
    main, low = split(value, "split16")
    assert_same_bits(join(main, low)[:-1], value[:-1])
    assert main[:4].isinf().all() and main[-1].isnan() and join(main, low)[-1].isnan()
    assert bits(main)[4:6].tolist() == [0, -(2**15)]


@pytest.mark.parametrize("name", SPLITS)
def test_all_nan_payloads_stay_nan(name, device):
    """Where the payload is in the lower half only, rounding it away would leave an infinity; others carry into -0."""
    words = [0x7F800001, 0x7F8000FF, 0x7F807FFF, 0x7F808000, 0x7FFFFFFF, 0x7FFF8000, 0x7FC00000]
    word = torch.tensor([*words, *(w - 2**31 for w in words)], dtype=torch.int64)
    word = torch.where(word > 2**31 - 1, word - 2**32, word).to(torch.int32).to(device)
    main, low = split(word.view(FLOAT32), name)
    assert main.isnan().all() and join(main, low).isnan().all()


@PROPERTY
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30),
    shape=st.sampled_from([(-1,), (-1, 1), (1, -1)]),
)
def test_split8_is_split16_rounded(words, shape, device):
    """To the nearer of the two values with 24 bits around it, half away from zero."""
    value = torch.tensor(words, dtype=torch.int32, device=device).view(shape).view(FLOAT32)
    fine, coarse = (join(*split(value, name)) for name in SPLITS)
    number = ~value.isnan()
    assert_same_bits(fine[number], value[number])
    assert coarse[~number].isnan().all()
    word = bits(value).long()
    away = torch.where(word < 0, word + 2**31, word) + 0x80 >> 8  # magnitudes of floats are ordered like their words
    assert torch.equal((bits(coarse).long() & 0x7FFFFFFF)[number.cpu()], (away << 8)[number.cpu()])


def test_masters_of_a_parameter_that_has_none(device):
    """A new master starts from the parameter; formats without one drop it and leave the parameter alone."""
    param = normal((7, 5), BFLOAT16, device).t()
    for name in ("bfloat16+master", "split16", "split8"):
        entry, main, (key, _) = {}, param.clone(), specs.PARAM_FORMATS[name].extra
        formats.convert_master(entry, main, specs.PARAM_FORMATS[name])
        assert entry[key].stride() == param.stride() and entry.keys() == {key}
        assert_same_bits([main, formats.decode_master(entry, main)], [param, param.float()])
        unchanged = entry[key]
        formats.convert_master(entry, main, specs.PARAM_FORMATS[name])
        assert entry[key] is unchanged
        formats.convert_master(entry, main, specs.PARAM_FORMATS["bfloat16"])
        assert entry == {}
        assert_same_bits(main, param)


def test_decoded_masters_share_no_memory(device):
    for dtype, result in ((FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (torch.float64, torch.float64)):
        param = normal((5,), dtype, device)
        value = formats.decode_master({}, param)
        assert value.dtype == result and torch.equal(value.double(), param.double())
        assert value.data_ptr() != param.data_ptr()
    master = normal((5,), FLOAT32, device)
    assert formats.decode_master({"master_param": master}, param).data_ptr() != master.data_ptr()


# ---- int8 ----------------------------------------------------------------------------------------------------------


def encode(value, moment="first"):
    entry = {"exp_avg": value, "exp_avg_sq": value.square() if moment == "first" else value}
    formats.convert_states(entry, ADAMW, INT8)
    key = "exp_avg" if moment == "first" else "exp_avg_sq"
    return entry[key], entry[f"{key}_scale"]


def decode(codes, scale, moment="first"):
    rule = specs.RULES["lion"] if moment == "first" else ADAMW
    key = "exp_avg" if moment == "first" else "exp_avg_sq"
    entry = {key: codes, f"{key}_scale": scale} | ({} if moment == "first" else {"exp_avg": scale})
    return formats.decode_states(entry, rule)[key]


@pytest.mark.parametrize("moment", ["first", "second"])
def test_all_codes_decode_to_what_they_stand_for(moment, device):
    """The upper bits of 2 + y, counted from those of 2; rising, of either sign for first moments."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    mantissa = 3 if moment == "first" else 4
    number = codes.cpu().long() & (0x7F if moment == "first" else 0xFF)
    y = torch.ldexp(1 + (number % 2**mantissa).double() / 2**mantissa, 1 + number // 2**mantissa) - 2
    exact = torch.where(codes.cpu() > 127, -y, y) if moment == "first" else y.square()
    values = decode(codes.view(torch.int8) if moment == "first" else codes, torch.ones(1, device=device), moment)
    assert_same_bits(values[number != 0], exact.float()[number != 0])  # y has few bits: the squares are exact too
    assert (values[number == 0] == 0).all()
    order = values[:128] if moment == "first" else values
    assert (order.diff() > 0).all()


@pytest.mark.parametrize("moment", ["first", "second"])
def test_encoding_again_changes_nothing(moment, device):
    """A decoded state keeps its codes; its scale, found from the largest decoded element, moves by its margin."""
    value = normal((1000,), device=device, seed=1)
    codes, scale = encode(value if moment == "first" else value.square(), moment)
    for _ in range(3):
        again, scale_again = encode(decode(codes, scale, moment), moment)
        assert_same_bits(again, codes)
        assert ((scale_again / scale - 1).abs() <= 2.0**-17).all()


@PROPERTY
@given(
    size=st.integers(1, 1500),
    seed=st.integers(0, 1000),
    values=st.sampled_from([normal, hard_values]),
    moment=st.sampled_from(["first", "second"]),
    exponent=st.integers(-30, 15),
)
def test_encoding_rounds_to_a_neighbour(size, seed, values, moment, exponent, device):
    """Within one code step of its block: as the engines' results are judged."""
    value = torch.ldexp(values((size,), device=device, seed=seed), torch.tensor(exponent, device=device))
    value = value.clamp(-1e30, 1e30) if moment == "first" else value.clamp(-1e15, 1e15).square()
    codes, scale = encode(value, moment)
    assert codes.dtype == (torch.int8 if moment == "first" else torch.uint8)
    assert scale.shape == (-(-size // BLOCK),)
    padding = (0, -size % BLOCK)
    exact = torch.nn.functional.pad(value.cpu().double(), padding)
    decoded = torch.nn.functional.pad(decode(codes, scale, moment).cpu(), padding)
    assert_codes(decoded, scale.cpu(), Bounded(exact, torch.zeros_like(exact), FLOAT32), moment, "round trip")
    if moment == "second":
        assert torch.equal(codes == 0, value == 0)


def test_rounding_is_to_nearest(device):
    """Between two codes of the middle of a block, except that small second moments must not become zero."""
    value = torch.linspace(0, 1, BLOCK, device=device)
    codes, scale = encode(value)
    y = value.double() / scale.double()
    # The float32 arithmetic before rounding is right to a few parts in 2^24 of 2 + y, a code step is over 1/16 of it.
    half = code_step(y * (1 + 2.0**-20), "first") / 2 * (1 + 2.0**-18)
    assert ((decode(codes, scale).double() - value).abs() <= half * scale.double()).all()


def test_blocks_follow_memory(device):
    """A transposed state has the codes and scales of the same memory in rows; so has one with reordered channels."""
    rows = normal((40, 30), device=device)
    codes, scale = encode(rows)
    turned, turned_scale = encode(rows.t())
    assert_same_bits([turned.t(), turned_scale], [codes, scale])
    assert turned.stride() == rows.t().stride()
    image = normal((3, 5, 7, 11), device=device).contiguous(memory_format=torch.channels_last)
    codes, scale = encode(image)
    assert codes.stride() == image.stride() and decode(codes, scale).stride() == image.stride()
    flat, flat_scale = encode(image.permute(0, 2, 3, 1).reshape(-1))
    assert_same_bits([codes.permute(0, 2, 3, 1).reshape(-1), scale], [flat, flat_scale])


def test_in_memory_order(device):
    storage = torch.arange(24.0, device=device)
    for view in (storage.view(4, 6), storage.view(4, 6).t(), storage.view(2, 3, 4).permute(2, 0, 1), storage):
        assert torch.equal(formats.in_memory_order(view), storage)
    assert torch.equal(formats.in_memory_order(storage[5:]), storage[5:])
    assert formats.in_memory_order(storage[0]).shape == (1,)
    assert formats.in_memory_order(storage[:0]).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_blocks_that_hold_nan_or_infinity_are_nan(bad, device):
    for moment in ("first", "second"):
        value = normal((3 * BLOCK,), device=device).abs()
        clean = decode(*encode(value, moment), moment)
        value[BLOCK + 7] = bad
        decoded = decode(*encode(value, moment), moment)
        assert decoded[BLOCK : 2 * BLOCK].isnan().all()
        others = [slice(0, BLOCK), slice(2 * BLOCK, None)]
        assert_same_bits([decoded[s] for s in others], [clean[s] for s in others])


def test_blocks_of_zeros_and_of_almost_nothing(device):
    for moment in ("first", "second"):
        codes, scale = encode(torch.zeros(300, device=device), moment)
        assert not codes.any() and not scale.any()
        assert not decode(codes, scale, moment).any()
    codes, scale = encode(torch.full((300,), 2.0**-149, device=device), "second")
    assert (codes > 0).all() and decode(codes, scale, "second").isfinite().all()
    tiny = decode(*encode(torch.full((300,), 2.0**-149, device=device)))
    assert (tiny.abs() <= 2.0**-149).all()


def test_small_second_moments_get_no_code_zero(device):
    """Beside one whose root is 10^15 times as large, the nearest code would be 0, which is kept for 0."""
    value = torch.ones(300, device=device)
    value[1:3] = torch.tensor([1e-30, 0.0])
    codes, _ = encode(value, "second")
    assert codes[:3].tolist()[1:] == [1, 0] and codes[0] > 1


def test_empty_and_scalar_states(device):
    for shape in ((0,), (3, 0), ()):
        for moment in ("first", "second"):
            codes, scale = encode(torch.ones(shape, device=device), moment)
            assert codes.shape == shape and scale.shape == formats.scale_shape(codes.numel())
            # 1 is 2^15 units, so 2 + y is rounded to 2^15, and the 2 is missing.
            root = torch.full(shape, 1 - 2.0**-14, device=device)
            assert_same_bits(decode(codes, scale, moment), root if moment == "first" else root.square())


@pytest.mark.parametrize("numel, blocks", [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2), (65536, 256), (65537, 257)])
def test_scale_shape(numel, blocks):
    assert formats.scale_shape(numel) == (blocks,)


def test_conversion_leaves_what_is_in_the_wanted_format(device):
    for name, spec in specs.STATE_FORMATS.items():
        if name in ("float64", "int8"):
            continue
        dtype = getattr(torch, spec.dtype("first"))
        entry = {key: normal((5,), dtype, device) for key in ADAMW.states}
        before = dict(entry)
        formats.convert_states(entry, ADAMW, spec)
        assert all(entry[key] is before[key] for key in before)
    codes, scale = encode(normal((5,), device=device))
    entry = {"exp_avg": codes, "exp_avg_scale": scale}
    formats.convert_states(entry, LION, INT8)
    assert entry["exp_avg"] is codes and entry["exp_avg_scale"] is scale
    formats.convert_states(entry, LION, specs.STATE_FORMATS["bfloat16"])
    assert entry.keys() == {"exp_avg"}
    assert_same_bits(entry["exp_avg"], decode(codes, scale).bfloat16())


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, options, param, state",
    [
        (FLOAT32, {}, "float32", "float32"),
        (BFLOAT16, {}, "bfloat16", "bfloat16"),
        (torch.float64, {}, "float64", "float64"),
        (BFLOAT16, {"master_weights": "fp32"}, "bfloat16+master", "float32"),
        (FLOAT16, {"master_weights": "fp32", "state_dtype": "bf16"}, "float16+master", "bfloat16"),
        (BFLOAT16, {"master_weights": "split16"}, "split16", "float32"),
        (BFLOAT16, {"master_weights": "split8", "state_dtype": torch.int8}, "split8", "int8"),
        (BFLOAT16, {"stochastic_rounding": True}, "bfloat16+stochastic", "bfloat16+stochastic"),
        (BFLOAT16, {"stochastic_rounding": True, "state_dtype": "fp32"}, "bfloat16+stochastic", "float32"),
        (FLOAT32, {"state_dtype": torch.bfloat16}, "float32", "bfloat16"),
        (FLOAT32, {"state_dtype": "int8", "min_8bit_size": 5001}, "float32", "float32"),
    ],
    ids=str,
)
def test_formats_of_a_group(dtype, options, param, state):
    tensor = torch.zeros(5000, dtype=dtype)
    assert formats.param_format("here", options, dtype).name == param
    assert formats.state_format("here", options, tensor).name == state
    assert formats.needs_seed(options) is (options.get("stochastic_rounding", False) or "int8" in str(options))


def test_messages_list_the_choices():
    for key, choices in (("master_weights", formats.MASTER_WEIGHTS), ("state_dtype", formats.STATE_DTYPES)):
        with pytest.raises(ValueError) as error:
            formats.check_format_options("here", {key: "fp7"}, ADAMW)
        assert all(repr(choice) in str(error.value) for choice in ("fp7", *choices)) and "here" in str(error.value)


def test_int8_for_a_rule_without_moments():
    rule = specs.RULES["sgd"]
    with pytest.raises(ValueError, match=r"int8.*sgd"):
        formats.check_format_options("here", {"state_dtype": "int8"}, rule)


@pytest.mark.parametrize("plain", [FLOAT32, BFLOAT16, FLOAT16])
def test_open_state_dtypes_follow_what_is_there(plain):
    """Only where the group leaves them open, and only plain ones."""
    param = torch.zeros(5000, dtype=BFLOAT16)
    entry = {key: torch.zeros(5000, dtype=plain) for key in ADAMW.states}
    # float16 states are for plain float16 parameters: no kernel has them beside others.
    name = "bfloat16" if plain == FLOAT16 else str(plain).removeprefix("torch.")
    assert formats.wanted_state_format("here", {}, param, entry, ADAMW).name == name
    half = param.to(FLOAT16)
    assert formats.wanted_state_format("here", {}, half, entry, ADAMW).name == str(plain).removeprefix("torch.")
    assert formats.wanted_state_format("here", {"state_dtype": "int8"}, param, entry, ADAMW).name == "int8"
    codes = {key: torch.zeros(5000, dtype=torch.int8) for key in ADAMW.states}
    assert formats.wanted_state_format("here", {}, param, codes, ADAMW).name == "bfloat16"
    assert formats.wanted_state_format("here", {}, param, {}, ADAMW).name == "bfloat16"
