"""The fit of the kernels' heuristic: what a name says, and that constants are found again."""

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "plugins" / "bench"
NAMES = (
    "decode_r2k4u6_s1", "wgmma_n64m64_s2_o2", "wgmma_n128m256_x2", "wgmma_n256m192_w2",
    "cutlass_128x128_c12_w1m", "cutlass_256x128_c12_w1n", "wgmma_n128m192_pingpong_x2",
    "cutlass_128x64_streamk_c11_w1m",
)  # fmt: skip


@pytest.fixture
def fit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("fit")


def cells(fit, constants):
    """What a GPU would measure whose times are those of the formula."""
    found = []
    for n, k in ((4096, 4096), (1152, 896), (28672, 4096), (8192, 8192)):
        for m in (1, 16, 128, 1024):
            cell = {"n": n, "k": k, "m": m, "candidates": dict.fromkeys(NAMES, 1.0), "listed": set(NAMES)}
            times = fit.expected(constants, fit.timed([cell])) / 1000
            found.append({**cell, "candidates": dict(zip(NAMES, times, strict=True))})
    return found


def test_a_name_says_what_the_tile_is(fit):
    decode, wgmma, cutlass, pingpong, stream_k = range(5)
    assert fit.parse("decode_r4k2u6_s8") == fit.Tile(decode, 64, 16, split=8, fills=False)
    assert fit.parse("wgmma_n128m64_s2_o2") == fit.Tile(wgmma, 128, 64, split=2, per_sm=2)
    assert fit.parse("wgmma_n128m64_x2_w4") == fit.Tile(
        wgmma, 128, 64, share_x=2, share_w=4, divides_rest=True
    )
    assert fit.parse("cutlass_256x128_c12_w1n") == fit.Tile(cutlass, 256, 128, share_w=2, rows_first=True)
    assert fit.parse("wgmma_n128m64_s2_x2_w2") == fit.Tile(wgmma, 128, 64, split=2, share_x=2, share_w=2)
    assert fit.parse("wgmma_n128m192_pingpong_x2") == fit.Tile(pingpong, 128, 192, share_x=2)
    assert fit.parse("cutlass_128x64_streamk_c11_w1m") == fit.Tile(stream_k, 128, 64, stream_k=True)
    assert fit.parse("reference") is None


@pytest.mark.parametrize(
    ("name", "clusters", "waves"),
    [
        ("wgmma_n128m128", 133, 2),
        ("wgmma_n64m64_s2_o2", 132, 1),
        ("wgmma_n64m64_s4_o2", 60, 1),  # as many clusters of 4 fit
        ("wgmma_n64m64_s4_o2", 61, 2),
        ("wgmma_n128m64_s3_w2", 17, 1),
        ("wgmma_n128m64_s3_w2", 18, 2),
        ("wgmma_n128m128_x2", 66 + 33, 1.5),  # what is left, one tile for each cluster, is split
        ("wgmma_n128m128_x2", 66 + 34, 2),
        ("wgmma_n128m128_x2", 30, 1),
        ("cutlass_256x128_c12_w1m", 66 + 1, 2),
        ("cutlass_128x64_streamk_c11_w1m", 198, 1.5),
    ],
)
def test_waves_are_whole_but_where_tiles_are_divided(fit, name, clusters, waves):
    assert fit.waves(fit.parse(name), clusters, steps=32) == pytest.approx(waves)


def test_absent_tokens_count_but_in_decode(fit):
    fetched = {
        name: [fit.terms(fit.parse(name), {"n": 64, "k": 128, "m": m})[3] for m in (1, 16)]
        for name in ("decode_r4k2u6_s1", "wgmma_n64m16")
    }
    assert fetched["wgmma_n64m16"][0] == fetched["wgmma_n64m16"][1] == fetched["decode_r4k2u6_s1"][1]
    assert fetched["decode_r4k2u6_s1"][0] < fetched["decode_r4k2u6_s1"][1]


def test_a_better_choice_has_the_lower_loss_and_the_fit_finds_it(fit, monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 1500)
    monkeypatch.setattr(fit, "SEARCHES", 1)
    start = fit.np.array(list(fit.MODELS.values()), dtype=float)
    truth = start * fit.np.array([[1.5, 0.7, 1.3, 2.0, 0.5]])
    data = fit.timed(cells(fit, truth))
    assert fit.loss(truth, data) == pytest.approx(0.0, abs=1e-12)
    found = fit.fit(data, list(fit.MODELS))
    assert fit.loss(found, data) < 0.2 * fit.loss(start, data)
    assert fit.ratios(fit.expected(found, data), data).mean() < 1.02


def test_the_cost_of_a_choice_is_its_time_over_the_best(fit):
    times = {NAMES[0]: 2.0, NAMES[1]: 3.0}
    data = fit.timed([{"n": 64, "k": 128, "m": 1, "candidates": times, "listed": set(times)}])
    assert fit.ratios(fit.np.array([5.0, 4.0]), data) == pytest.approx([1.5])
    assert fit.ratios(fit.np.array([4.0, 5.0]), data) == pytest.approx([1.0])
