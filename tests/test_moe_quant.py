"""Encodings of expert matrices: error bounds, exact bytes, products, and the host and device decoders in agreement."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from moe_cases import dequantize

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.kernels import blocks
from specmd_jax.moe.model import quant

ENCODED = [("int8", None), ("int8", 32), ("int4", None), ("int4", 16)]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def matrix(rows=24, columns=128, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * rng.lognormal(0, 3, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize(("precision", "group"), ENCODED)
def test_every_entry_is_within_half_a_scale(precision, group):
    w = matrix()
    w[3] = 0  # a row without any scale of its own
    leaf = quant.quantize(w, precision, group)
    decoded = np.asarray(dequantize(leaf))
    half = np.repeat(leaf.scales.astype(np.float32) / 2, w.shape[1] // leaf.scales.shape[1], axis=1)
    assert (np.abs(decoded - w) <= half * (1 + 1e-5)).all()
    assert not decoded[3].any()
    largest = {"int8": 127, "int4": 7}[precision]
    assert leaf.scales.astype(np.float32).max() <= np.abs(w).max() / largest * (1 + 2**-7)  # rounded up, not further


def test_two_bits_take_the_scale_of_the_least_squared_error():
    w = matrix()
    w[3] = 0
    leaf = quant.quantize(w, "int2")
    decoded = np.asarray(dequantize(leaf))
    assert not decoded[3].any()
    others = np.arange(24) != 3
    scales = np.repeat(leaf.scales[others].astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(np.unique(decoded[others] / scales), [-1.5, -0.5, 0.5, 1.5])
    off = np.square(decoded - w).reshape(24, 4, 32).sum(axis=-1)
    peak = np.abs(w).reshape(24, 4, 32).max(axis=-1)
    for share in quant.INT2_SHARES:  # scales of the code are rounded up to bfloat16, these are not
        scale = (peak / 1.5 * share)[:, :, None]
        codes = np.clip(np.rint(w.reshape(24, 4, 32) / np.where(scale == 0, 1, scale) + 1.5), 0, 3)
        assert (off <= 1.05 * np.square((codes - 1.5) * scale - w.reshape(24, 4, 32)).sum(axis=-1) + 1e-12).all()
    assert blocks.serves(quant.words(leaf)) == "codes of 2 bits, expected 4 or 8"
    with pytest.raises(SpecmdError, match="int2 with groups of 32 does not divide a row of 48 columns"):
        quant.quantize(w[:, :48], "int2")


@pytest.mark.parametrize("precision", sorted(quant.BITS))
def test_bytes_are_those_of_the_arrays(precision):
    spec = quant.matrix_spec(24, 128, precision)
    if precision != "mxfp4":
        leaf = quant.quantize(matrix(), precision)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), spec) == jax.tree.map(lambda a: (a.shape, a.dtype), leaf)
        assert quant.tree_bytes(spec) == sum(leaf.nbytes for leaf in jax.tree.leaves(leaf))
    expected = {
        "float32": 32,
        "bfloat16": 16,
        "float16": 16,
        "int8": 8 + 16 / 128,
        "int4": 4.5,
        "mxfp4": 4.25,
        "int2": 2.5,
    }
    assert quant.tree_bytes(spec) == 24 * 128 * expected[precision] / 8


def test_bytes_of_an_expert_count_scales_and_biases():
    cfg = moe.tiny("gpt_oss", "bfloat16")  # 64 x 64: gate_up [128, 64], down [64, 64], biases 128 + 64
    assert moe.expert_bytes(cfg) == 2 * (128 * 64 + 64 * 64 + 128 + 64)
    assert moe.expert_bytes(cfg, "int4") == (128 + 64) * 64 * 4.5 / 8 + 2 * (128 + 64)
    assert weights.store_bytes(cfg, "int8") == 3 * 8 * ((128 + 64) * (64 + 2) + 2 * (128 + 64))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("precision", "group"), [*ENCODED, ("int2", None), ("int2", 16), ("float32", None), ("bfloat16", None)]
)
def test_products_are_those_of_the_decoded_matrix(precision, group, rows):
    w, x = matrix(), np.random.default_rng(1).standard_normal((rows, 128)).astype(np.float32)
    leaf = quant.quantize(w, precision, group)
    got = jax.jit(quant.matmul)(jnp.asarray(x), leaf)
    expected = x.astype(np.float64) @ np.asarray(dequantize(leaf), np.float64).T
    scale = np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T
    assert got.dtype == jnp.float32
    assert (np.abs(got - expected) <= 1e-6 * scale).all()


def test_stacks_decode_like_their_members():
    leaves = [quant.quantize(matrix(seed=s), "int4") for s in range(3)]
    stack = jax.tree.map(lambda *a: np.stack(a), *leaves)
    whole = np.asarray(dequantize(stack))
    for one, leaf in zip(whole, leaves, strict=True):
        np.testing.assert_array_equal(one, dequantize(leaf))


def test_mxfp4_decodes_by_the_format():
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.arange(3, 251, 16, dtype=np.uint8)[:, None]  # 2 ** -124 .. 2 ** 116
    packed = quant.MXFP4(codes, scales)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for row, column in ((0, 0), (3, 5), (9, 31), (15, 30)):
        nibble = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
        expected = (-1.0 if nibble & 8 else 1.0) * magnitudes[nibble & 7] * 2.0 ** (int(scales[row, 0]) - 127)
        assert weights.decode_mxfp4(packed)[row, column] == np.float32(expected)
    host, device = weights.decode_mxfp4(packed), np.asarray(dequantize(packed))
    np.testing.assert_array_equal(host, device)
    assert (host == host.astype(ml_dtypes.bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quant.matrix_spec(4, 64, "int5"), r"unknown precision 'int5'; did you mean 'int\d'"),
        (lambda: quant.matrix_spec(4, 48, "int4"), "int4 with groups of 32 does not divide a row of 48"),
        (lambda: quant.matrix_spec(4, 64, "int8", 24), "int8 with groups of 24 does not divide a row of 64"),
        (lambda: quant.quantize(matrix(), "mxfp4"), "mxfp4 experts can only be read from a checkpoint"),
        (lambda: quant.quantize(matrix() * np.nan, "int8"), "values that are not finite"),
    ],
)
def test_errors(make, message):
    with pytest.raises(SpecmdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
