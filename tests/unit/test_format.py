import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbb_export import format as fmt
from qbb_export.errors import QbbError

SHAPES = st.tuples(st.integers(1, 100), st.integers(1, 50), st.integers(1, 8), st.sampled_from([0, 32, 64]))


@given(SHAPES, st.sampled_from(fmt.LAYOUTS), st.booleans(), st.integers(0, 2**32 - 1))
def test_layouts_round_trip(shape, layout, with_offset, seed):
    k, n, bases, group_size = shape
    rng = np.random.default_rng(seed)
    spec = fmt.Spec(k, n, bases, fmt.effective_group_size(k, group_size), layout)
    signs = rng.random((bases, n, k)) < 0.5
    scales = rng.random((bases, n, spec.groups)).astype(np.float16)
    offset = rng.random((n, spec.groups)).astype(np.float32) if with_offset else None
    planes, tiled_scales, tiled_offset = fmt.to_layout(fmt.pack_words(signs), scales, offset, spec)
    assert planes.shape == spec.planes_shape
    assert planes.dtype == np.uint32
    assert tiled_scales.shape == spec.scales_shape
    words, row_scales, row_offset = fmt.from_layout(planes, tiled_scales, tiled_offset, spec)
    assert np.array_equal(fmt.unpack_words(words, k), signs)
    assert np.array_equal(row_scales, scales)
    assert np.array_equal(row_offset, offset if with_offset else [[0]])


def test_bits_of_layout_0_are_least_significant_first():
    signs = np.zeros((1, 1, 40), np.bool_)
    signs[0, 0, [0, 5, 31, 33]] = True
    assert fmt.pack_words(signs).tolist() == [[[(1 << 0) | (1 << 5) | (1 << 31), 1 << 1]]]


@pytest.mark.parametrize("k", range(32))
def test_bit_of_each_input_in_layout_1(k):
    """Byte j: inputs 4j..4j+3 in the low, 16+4j..16+4j+3 in the high nibble."""
    byte, bit = (k // 4, k % 4) if k < 16 else ((k - 16) // 4, 4 + k % 4)
    assert fmt.swizzle(np.asarray([1 << k], np.uint32)).tolist() == [1 << (8 * byte + bit)]


def test_place_of_a_row_in_layout_1():
    """Word w of row n is B[b, n // 16, w, n % 16]; rows past N are zero."""
    spec = fmt.Spec(K=64, N=18, bases=1, group_size=32)
    words = np.arange(1, 37, dtype=np.uint32).reshape(1, 18, 2)
    scales = np.arange(36, dtype=np.float16).reshape(1, 18, 2)
    planes, tiled, _ = fmt.to_layout(words, scales, None, spec)
    for n in range(18):
        for w in range(2):
            assert planes[0, n // 16, w, n % 16] == fmt.swizzle(words[0, n, w])
            assert tiled[0, n // 16, w, n % 16] == scales[0, n, w]
    assert not planes[0, 1, :, 2:].any()
    assert not tiled[0, 1, :, 2:].any()


def test_bits_per_weight_counts_scales_offset_and_padding():
    assert fmt.bits_per_weight(fmt.Spec(4096, 4096, 4, 128)) == pytest.approx(4.5, abs=1e-5)
    assert fmt.bits_per_weight(fmt.Spec(4096, 4096, 3, 128), offset=True) == 3 + 48 / 128 + 32 / 128
    assert fmt.bits_per_weight(fmt.Spec(1, 1, 1, 1, fmt.LAYOUT_ROWS)) == 32 + 16 + 32
    assert fmt.bits_per_weight(fmt.Spec(32, 1, 1, 32)) == (16 * 32 + 16 * 16 + 32) / 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"unknown format version .* expected 1; got 2"),
        ({"layout": 2}, r"unknown layout"),
        ({"K": 0}, r"empty matrix"),
        ({"N": -1}, r"empty matrix"),
        ({"bases": 0}, r"bad number of bases; expected 1\.\.8; got 0"),
        ({"bases": 9}, r"bad number of bases"),
        ({"group_size": 0}, r"bad group_size"),
        ({"group_size": 48}, r"bad group_size"),
        ({"group_size": 128}, r"bad group_size; expected K \(100\)"),
        ({"group_size": -32}, r"bad group_size"),
    ],
)
def test_spec_refuses(change, message):
    with pytest.raises(QbbError, match=message):
        fmt.Spec(**({"K": 100, "N": 10, "bases": 2, "group_size": 32} | change))


def test_group_size_of_a_layer():
    assert [fmt.effective_group_size(100, g) for g in (0, 32, 64, 96, 128)] == [100, 32, 64, 96, 100]
    for bad in (-32, 1, 33):
        with pytest.raises(QbbError, match="bad group size"):
            fmt.effective_group_size(100, bad)


def test_errors_are_one_line():
    error = QbbError("cannot\nread", where="a\nb", expected="x", got=ValueError("many\n\n  lines"))
    assert str(error) == "a b: cannot read; expected x; got many lines"


def test_errors_do_not_speak_to_the_terminal():
    assert str(QbbError("no such node", got="\x1b[2J\0\ud800é")) == r"no such node; got \x1b[2J\x00\ud800é"


def test_modes_have_numbers():
    assert [fmt.mode_number(mode) for mode in fmt.MODES] == [0, 1, 2]
    with pytest.raises(QbbError, match="--mode: unknown mode; expected exact or int8 or int16; got int4"):
        fmt.mode_number("int4")


@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize(("wrong", "what"), [(0, "planes"), (1, "scales"), (2, "offset")])
def test_arrays_that_do_not_fit_the_attributes(layout, wrong, what):
    spec = fmt.Spec(70, 5, 2, 32, layout)
    arrays = [np.zeros((2, 5, 3), np.uint32), np.zeros((2, 5, 3), np.float16), np.zeros((5, 3), np.float32)]
    fmt.to_layout(*arrays, spec)
    arrays[wrong] = arrays[wrong][..., :2]
    with pytest.raises(QbbError, match=f"wrong shape of {what}; expected"):
        fmt.to_layout(*arrays, spec)
