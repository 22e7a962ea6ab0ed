"""The layout es24-v1 against a scalar loop, the C++ header, CUTLASS, and an emulation of `mma.sp`."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24

REPOSITORY = Path(__file__).parents[2]
HALF, BFLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SHAPES = [(1, 4), (5, 36), (8, 32), (64, 128), (72, 160), (130, 260), (200, 400)]


def sparse(rows: int, channels: int, dtype: np.dtype = HALF, seed: int = 0) -> NDArray:
    """Small integers, at most two nonzeros in each chunk, many chunks with fewer, zeros of both signs."""
    random = np.random.default_rng(seed)
    values = random.integers(-4, 5, (rows, channels // 4, 4)).astype(dtype)
    kept = random.random((rows, channels // 4, 4)).argsort(axis=-1) < 2
    return (values * kept).reshape(rows, channels)


def bits(values: NDArray) -> NDArray[np.uint16]:
    return values.view(np.uint16)


def without_minus_zero(values: NDArray) -> NDArray[np.uint16]:
    return np.where(values == 0, 0, bits(values))


def formula(rows: int, channels: int) -> NDArray[np.int64]:
    """The bit at which the nibble of each row and chunk begins, `[rows, K/4]`, by the specification."""
    offsets = np.empty((rows, channels // 4), dtype=np.int64)
    for n, chunk in np.ndindex(*offsets.shape):
        k = 4 * chunk
        kt, q, h, c = k // 128, k % 128 // 32, k % 32 // 16, k % 16 // 4
        nt, r16, g, upper = n // 64, n % 64 // 16, n % 8, n % 16 // 8
        word = ((((kt * -(-rows // 64) + nt) * 4 + r16) * 2 + h) * 8 + g) * 4 + q
        offsets[n, chunk] = 32 * word + 16 * upper + 4 * c
    return offsets


def places(chunk: NDArray[np.uint16]) -> tuple[int, int]:
    """Where the two stored values of a chunk belong, by the specification's rule."""
    nonzero = [i for i in range(4) if chunk[i] & 0x7FFF]
    if len(nonzero) == 2:
        return nonzero[0], nonzero[1]
    if len(nonzero) == 1:
        return (0, 3) if nonzero == [3] else (nonzero[0], 3)
    return 0, 1


def scalar_values(weight: NDArray) -> NDArray[np.uint16]:
    values = np.empty((*weight.shape[:-1], weight.shape[1] // 2), dtype=np.uint16)
    for n, slot in np.ndindex(*values.shape):
        chunk = bits(weight)[n, 4 * (slot // 2) :][:4]
        value = chunk[places(chunk)[slot % 2]]
        values[n, slot] = value if value & 0x7FFF else 0
    return values


def scalar_words(weight: NDArray, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The metadata with every chunk's nibble at its offset, and 0x4 elsewhere."""
    rows, channels = weight.shape
    words = [0x44444444] * (-(-channels // 128) * -(-rows // 64) * 256)
    for n, chunk in np.ndindex(*offsets.shape):
        first, second = places(bits(weight)[n, 4 * chunk :][:4])
        word, shift = divmod(int(offsets[n, chunk]), 32)
        words[word] = words[word] & ~(0xF << shift) | (first | second << 2) << shift
    return np.array(words, dtype=np.uint32)


def packed_words(weight: NDArray) -> NDArray[np.uint32]:
    return es24.pack(weight).metadata.view(np.uint32).ravel()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_scalar_loop(shape: tuple[int, int], dtype: np.dtype) -> None:
    weight = sparse(*shape, dtype)
    packed = es24.pack(weight)
    assert packed.values.dtype == dtype
    assert packed.metadata.dtype == np.int32
    assert packed.metadata.shape == es24.metadata_shape(*shape)
    np.testing.assert_array_equal(bits(packed.values), scalar_values(weight))
    np.testing.assert_array_equal(packed_words(weight), scalar_words(weight, formula(*shape)))
    assert packed.values.nbytes + packed.metadata.nbytes == es24.packed_bytes(*shape)
    np.testing.assert_array_equal(bits(es24.unpack(packed)), without_minus_zero(weight))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_every_chunk_of_special_values(dtype: np.dtype) -> None:
    """All 2:4 chunks of zeros of both signs, numbers, the smallest subnormal, infinity and a NaN."""
    tiny = np.array([1], dtype=np.uint16).view(dtype)[0]
    nan = np.array([0xFFC1], dtype=np.uint16).view(dtype)[0]  # negative, with a payload
    alphabet = np.array([0.0, -0.0, 1.5, -2.0, tiny, -np.inf, nan], dtype=dtype)
    chunks = [
        c for c in itertools.product(range(len(alphabet)), repeat=4) if sum(index > 1 for index in c) <= 2
    ]
    assert {tuple(index > 1 for index in c) for c in chunks} == {
        places for places in itertools.product([False, True], repeat=4) if sum(places) <= 2
    }
    chunks += [(0, 0, 0, 0)] * (-len(chunks) % 8)
    weight = alphabet[np.array(chunks).reshape(-1, 32)]
    packed = es24.pack(weight)
    np.testing.assert_array_equal(bits(packed.values), scalar_values(weight))
    np.testing.assert_array_equal(packed_words(weight), scalar_words(weight, formula(*weight.shape)))
    assert not (bits(packed.values) == 0x8000).any()
    np.testing.assert_array_equal(bits(es24.unpack(packed)), without_minus_zero(weight))


def test_places_of_degenerate_chunks() -> None:
    """Literally as the specification has them, and in every chunk of a word."""
    chunks = {(0, 0, 0, 0): 0x4, (7, 0, 0, 0): 0xC, (0, 7, 0, 0): 0xD, (0, 0, 7, 0): 0xE, (0, 0, 0, 7): 0xC}
    chunks |= {(7, 7, 0, 0): 0x4, (7, 0, 7, 0): 0x8, (7, 0, 0, 7): 0xC, (0, 7, 7, 0): 0x9, (0, 0, 7, 7): 0xE}
    for c, (chunk, nibble) in itertools.product(range(4), chunks.items()):
        weight = np.zeros((1, 16), dtype=HALF)
        weight[0, 4 * c : 4 * c + 4] = chunk
        word = int(es24.pack(weight).metadata.view(np.uint32)[0, 0, 0, 0, 0, 0])
        assert word == 0x44444444 & ~(0xF << 4 * c) | nibble << 4 * c, (c, chunk)


@given(st.integers(1, 150), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(rows: int, chunks: int, seed: int) -> None:
    weight = sparse(rows, 4 * chunks, seed=seed)
    np.testing.assert_array_equal(bits(es24.unpack(es24.pack(weight))), without_minus_zero(weight))


def test_any_strides() -> None:
    """ONNX holds most weights as [K, N]; more rows than are packed in one go."""
    weight = sparse(1500, 512, seed=3)
    expected = es24.pack(weight)
    wide = np.zeros((1500, 1024), dtype=HALF)
    wide[:, ::2] = weight
    for same in (np.asfortranarray(weight), wide[:, ::2], weight[::-1].copy()[::-1]):
        packed = es24.pack(same)
        np.testing.assert_array_equal(bits(packed.values), bits(expected.values))
        np.testing.assert_array_equal(packed.metadata, expected.metadata)


def test_layers_tiled_together() -> None:
    """Rows of several layers, none of which fills whole tiles, are those of one layer."""
    weight = sparse(8 + 72 + 40, 160)
    parts = [es24.compress(part) for part in np.split(weight, [8, 80])]
    metadata = es24.tile([places for _, places in parts], 160)
    np.testing.assert_array_equal(metadata, es24.pack(weight).metadata)


@pytest.mark.parametrize(
    ("chunk", "shown"),
    [
        ([0.5, -1.25, np.nan, 3], "0.5, -1.25, nan, 3"),
        ([0, -1.25, np.nan, 3], "0, -1.25, nan, 3"),
        ([0.5, 0, np.nan, 3], "0.5, 0, nan, 3"),
        ([0.5, -1.25, 0, 3], "0.5, -1.25, 0, 3"),
        ([0.5, -1.25, np.nan, 0], "0.5, -1.25, nan, 0"),
    ],
)
def test_more_than_two_nonzeros_are_refused(chunk: list[float], shown: str) -> None:
    weight = sparse(700, 1024)
    weight[650, 4 * 201 : 4 * 202] = chunk
    weight[650, 4 * 202 : 4 * 203] = 1
    with pytest.raises(EsparseError) as caught:
        es24.pack(weight, "model.layers.3.mlp.up_proj")
    assert caught.value.where == "model.layers.3.mlp.up_proj"
    assert caught.value.what == f"not 2:4: row 650, chunk 201 (channels 804 to 807) holds [{shown}]"


@pytest.mark.parametrize("weight", [np.zeros((8, 32), np.float32), np.zeros((8, 30), np.float16)])
def test_what_the_layout_cannot_hold_is_refused(weight: NDArray) -> None:
    with pytest.raises(EsparseError, match=f"this one is {weight.dtype.name} with K = {weight.shape[1]}"):
        es24.pack(weight)


@pytest.mark.parametrize(
    ("rows", "channels", "dtype", "reason"),
    [
        (64, 128, HALF, None),
        (4096, 11008, BFLOAT, None),
        (64, 96, HALF, None),  # a quarter of the last tile is padding: 0.583
        (4096, 4096, np.dtype(np.float32), "holds float16 or bfloat16, not float32"),
        (4096, 4112, HALF, "K = 4112 is not a multiple of 32"),
        (4100, 4096, HALF, "N = 4100 is not a multiple of 8"),
        (64, 64, HALF, "it would be 0.625 of its dense size, more than 0.6"),
        (8, 4096, HALF, "it would be 1.000 of its dense size, more than 0.6"),
    ],
)
def test_what_the_kernels_can_take(rows: int, channels: int, dtype: np.dtype, reason: str | None) -> None:
    found = es24.why_not(rows, channels, dtype)
    assert found is None if reason is None else reason in (found or "")


def test_size() -> None:
    assert es24.packed_bytes(4096, 11008) == 0.5625 * 2 * 4096 * 11008


def test_metadata_of_another_weight_is_refused() -> None:
    packed = es24.pack(sparse(64, 256))
    with pytest.raises(EsparseError, match=r"need int32 metadata \[2, 1, 4, 2, 8, 4\], found int32 \[1, 1"):
        es24.unpack(packed._replace(metadata=packed.metadata[:1]))
    with pytest.raises(EsparseError, match="found int64"):
        es24.unpack(packed._replace(metadata=packed.metadata.astype(np.int64)))


def test_damaged_metadata_is_refused() -> None:
    packed = es24.pack(np.zeros((64, 128), dtype=HALF))
    packed.metadata[0, 0, 2, 1, 3, 2] ^= 0x4 << 20  # row 32 + 3 + 8, k = 64 + 16 + 4
    with pytest.raises(EsparseError, match="row 43, chunk 21 has the nibble 0x0"):
        es24.unpack(packed)


# --- the hardware --------------------------------------------------------------------------------------


def mma_sp_m16n8k32(a: NDArray, words: list[int], selector: int, b: NDArray) -> NDArray:
    """`mma.sp::ordered_metadata.m16n8k32` for one warp, as the PTX manual maps lanes to elements.

    Args:
        a: values `[lane, register, 2]`: lane 4g + t holds row g (even registers) or g + 8 (odd ones), values
            2t and 2t + 1 of the first (registers 0 and 1) or second 8 of the row's 16.
        words: one a lane. Of lanes 4g + 2 selector and 4g + 2 selector + 1 the low halves have the places of
            row g at k 0-15 and 16-31, the high halves those of row g + 8.
        selector: 0 or 1.
        b: `[lane, register, 2]`: lane 4g + t holds column g, rows 2t and 2t + 1 of the register's 8.

    Returns:
        The product, 16 x 8.
    """
    left, right = np.zeros((16, 32)), np.zeros((32, 8))
    for lane, register in itertools.product(range(32), range(4)):
        g, t = divmod(lane, 4)
        row, chunk = g + 8 * (register % 2), t + 4 * (register // 2)
        word = words[4 * g + 2 * selector + chunk // 4]
        nibble = word >> (16 * (register % 2) + 4 * (chunk % 4)) & 0xF
        first, second = nibble & 3, nibble >> 2
        assert first < second
        left[row, 4 * chunk + first], left[row, 4 * chunk + second] = a[lane, register]
        right[8 * register + 2 * t : 8 * register + 2 * t + 2, g] = b[lane, register]
    return left @ right


@pytest.mark.parametrize("selector", [0, 1])
def test_tensor_cores_multiply_straight_from_the_words(selector: int) -> None:
    """Every fragment is loaded as it lies: no bit of the metadata is moved."""
    rows, channels, tokens = 72, 160, 8
    weight = sparse(rows, channels, seed=1)
    x = np.random.default_rng(2).integers(-3, 4, (tokens, channels)).astype(np.float32)
    values, metadata = es24.pack(weight)
    values = np.pad(values.astype(np.float32), ((0, -rows % 16), (0, 0)))
    words = metadata.view(np.uint32)
    y = np.zeros((rows + -rows % 16, tokens))
    for n, k in itertools.product(range(0, rows, 16), range(0, channels, 32)):
        a, b, e = np.zeros((32, 4, 2)), np.zeros((32, 4, 2)), [0] * 32
        for lane in range(32):
            g, t = divmod(lane, 4)
            if t // 2 == selector:
                e[lane] = int(words[k // 128, n // 64, n % 64 // 16, t % 2, g, k % 128 // 32])
            for register in range(4):
                value = k // 2 + 2 * t + 8 * (register // 2)
                a[lane, register] = values[n + g + 8 * (register % 2), value : value + 2]
                b[lane, register] = x[g, k + 8 * register + 2 * t :][:2]
        y[n : n + 16] += mma_sp_m16n8k32(a, e, selector, b)
    np.testing.assert_array_equal(y[:rows], weight.astype(np.float32) @ x.T)


# --- C++ ------------------------------------------------------------------------------------------------


def compiled(folder: Path, source: str, *options: str) -> Callable[..., NDArray[np.int64]]:
    """A C++ program that prints integers, as a function of its arguments."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (folder / "offsets.cpp").write_text(source)
    command = [
        compiler,
        "-std=c++17",
        "-w",
        *options,
        str(folder / "offsets.cpp"),
        "-o",
        str(folder / "offsets"),
    ]
    subprocess.run(command, check=True)

    def run(*arguments: int) -> NDArray[np.int64]:
        line = [str(folder / "offsets"), *map(str, arguments)]
        return np.array(subprocess.run(line, check=True, capture_output=True).stdout.split(), dtype=np.int64)

    return run


HEADER_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "esparse/es24.h"
int main(int, char** argv) {
  const long rows = std::atol(argv[1]), channels = std::atol(argv[2]);
  std::printf("%ld\\n", static_cast<long>(esparse::metadata_words(rows, channels)));
  for (long n = 0; n < rows; ++n)
    for (long chunk = 0; chunk < channels / 4; ++chunk) {
      const auto [word, shift] = esparse::metadata_bits(n, chunk, rows);
      std::printf("%ld\\n", static_cast<long>(32 * word + shift));
    }
}
"""


def test_the_header_has_the_same_formula(tmp_path: Path) -> None:
    run = compiled(tmp_path, HEADER_PROGRAM, "-I", str(REPOSITORY / "plugins" / "include"))
    for rows, channels in SHAPES:
        size, *offsets = run(rows, channels)
        assert size == np.prod(es24.metadata_shape(rows, channels))
        offsets = np.reshape(offsets, (rows, channels // 4))
        weight = sparse(rows, channels)
        np.testing.assert_array_equal(packed_words(weight), scalar_words(weight, offsets))


CUTLASS_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
int main(int, char** argv) {
  const int rows = std::atoi(argv[1]), channels = std::atoi(argv[2]);
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::half_t>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, cute::Int<128>>;
  const auto layout = Config::fill_layoutE(cute::make_shape(rows, 64, channels, 1));
  // The layout counts logical weights, 8 to a byte of metadata: offsets are in bits.
  for (int n = 0; n < rows; ++n)
    for (int k = 0; k < channels; k += 4) std::printf("%d\\n", static_cast<int>(layout(n, k, 0)));
}
"""


def cutlass_headers() -> Path | None:
    """Of a CUTLASS given by the environment, or of the `nvidia-cutlass` wheel."""
    if path := os.environ.get("CUTLASS_PATH"):
        return Path(path) / "include"
    wheel = importlib.util.find_spec("cutlass_library")
    return Path(wheel.origin).parent / "source" / "include" if wheel and wheel.origin else None


def test_cutlass_computes_the_same_layout(tmp_path: Path) -> None:
    headers, cuda = cutlass_headers(), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if headers is None or not (cuda / "cuda_fp16.h").exists():
        pytest.skip("needs the CUDA toolkit, and CUTLASS_PATH or the wheel nvidia-cutlass==4.2.0.0")
    includes = [f"-I{path}" for path in (headers, cuda, cuda / "cccl")]
    run = compiled(tmp_path, CUTLASS_PROGRAM, *includes)
    for rows, channels in SHAPES:
        offsets = run(rows, channels).reshape(rows, channels // 4)
        weight = sparse(rows, channels)
        np.testing.assert_array_equal(packed_words(weight), scalar_words(weight, offsets))


def test_the_layout_that_cutlass_printed() -> None:
    """`Sm90GemmSparseConfig::fill_layoutE` of CUTLASS 4.2.0 for 200 x 400, as `cute::print` shows it:

    (((_8,_2,_4),4),((_16,_2,_4),4),1):(((_128,_16,_2048),_8192),((_1,_1024,_32),32768),0)
    """
    n, k = np.arange(200)[:, None], np.arange(0, 400, 4)[None]
    offsets = n % 8 * 128 + n // 8 % 2 * 16 + n // 16 % 4 * 2048 + n // 64 * 8192
    offsets = offsets + k % 16 + k // 16 % 2 * 1024 + k // 32 % 4 * 32 + k // 128 * 32768
    weight = sparse(200, 400)
    np.testing.assert_array_equal(packed_words(weight), scalar_words(weight, offsets))
