"""The tuning table, the search of the tuner, and what is decided from them; on a GPU that is played."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esparse_trt import tuning
from esparse_trt.cli import app
from esparse_trt.engine import table as tables
from esparse_trt.engine import timing, tune
from esparse_trt.engine.kernels import Problem
from esparse_trt.engine.table import (
    BUCKETS,
    Best,
    Device,
    Row,
    Table,
    choices,
    load_table,
    times,
    usable_table,
)
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import load_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
H100 = Device("NVIDIA H100 80GB HBM3", 90, 132, "580.95", "13.0")


def row(m, us, dense_us, n=4096, k=4096, candidate="decode_a", chained=None):
    """`chained`: kernel and microseconds with programmatic dependent launch, if they differ."""
    plain = Best(candidate, us, us, us)
    kernel, faster = chained or (candidate, us)
    programmatic, dense = Best(kernel, faster, faster, faster), Best("torch.mm", dense_us, dense_us, dense_us)
    return Row(n, k, "float16", m, plain, programmatic, dense)


def make_table(*rows, device=H100, kernel_set="abc123"):
    return Table(device, "0.1.0", kernel_set, "2026-11-22", {r.key: r for r in rows})


# --- the file ----------------------------------------------------------------------------------------------


def test_a_table_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "table.json"
    table = make_table(row(1, 7.5, 14.0), row(16, 9.0, 15.0), row(1, 3.0, 2.0, n=64))
    table.save(path)
    assert load_table(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a tuning table"),
        ("[]", "not a tuning table"),
        ('{"schema": 7}', "schema 7"),
        ('{"schema": 1, "device": {}, "rows": []}', "reads schema 2"),
        ('{"schema": 2, "device": {}, "rows": []}', "not a tuning table"),
        ('{"schema": 2, "rows": [{"n": 1}]}', "not a tuning table"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path, text, words):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(EsparseError, match=words) as error:
        load_table(path)
    assert error.value.where == str(path)


def test_the_default_place_is_the_users_cache_one_file_per_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.default_path(H100.name) == tmp_path / "esparse-trt/tune/nvidia-h100-80gb-hbm3.json"


# --- foreign tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel_set", "device", "words"),
    [
        ("other", H100, "measured with the kernels abc123"),
        ("abc123", replace(H100, name="NVIDIA A100"), "measured on NVIDIA H100"),
        ("abc123", replace(H100, multiprocessors=114), "132 multiprocessors, this GPU .* 114"),
    ],
)
def test_a_foreign_table_is_not_used_and_a_warning_says_why(monkeypatch, tmp_path, kernel_set, device, words):
    said = []
    monkeypatch.setattr(tables, "note", lambda message, **facts: said.append(message))
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0)).save(path)
    assert usable_table(path, kernel_set, device) is None
    (message,) = said
    assert re.search(words, message)
    assert "static heuristic" in message and "esparse-trt tune" in message


def test_another_driver_is_the_same_gpu_and_no_gpu_at_all_is_taken_on_trust(tmp_path):
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0)).save(path)
    assert usable_table(path, "abc123", replace(H100, driver="999", cuda="14.0")) is not None
    assert usable_table(path, "abc123", None) is not None


def test_the_shipped_table_is_for_the_gpu_that_it_was_measured_on():
    shipped = tables.reference_table(H100)
    assert shipped is not None and {row.m for row in shipped.of_layer(4096, 4096, "float16")} >= {1, 16, 4096}
    assert tables.reference_table(replace(H100, name="NVIDIA H100 PCIe")) is None


def test_a_table_that_is_not_there_is_none(tmp_path):
    assert usable_table(tmp_path / "none.json", "abc123", H100) is None


def test_the_tuner_does_not_overwrite_another_gpus_table_but_starts_anew_for_other_kernels(tmp_path):
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0), device=replace(H100, name="NVIDIA A100")).save(path)
    with pytest.raises(EsparseError, match="measured on NVIDIA A100"):
        tune.open_table(path, Library(), H100)
    make_table(row(1, 7.5, 14.0), kernel_set="old").save(path)
    assert tune.open_table(path, Library(), H100).rows == {}
    make_table(row(1, 7.5, 14.0)).save(path)
    assert len(tune.open_table(path, Library(), H100).rows) == 1


# --- what it is used for -----------------------------------------------------------------------------------


def test_choices_are_the_plugins_field_in_ascending_order():
    table = make_table(row(64, 9, 15, candidate="wgmma_b"), row(1, 7, 14), row(16, 8, 14), row(1, 1, 1, n=8))
    assert choices(table, 4096, 4096, "float16") == "1=decode_a,16=decode_a,64=wgmma_b"
    assert choices(table, 4096, 4096, "bfloat16") is None
    assert choices(None, 4096, 4096, "float16") is None


def test_either_way_of_launching_has_kernels_and_times_of_its_own():
    table = make_table(row(1, 8.0, 14.0, chained=("decode_b", 7.0)))
    assert choices(table, 4096, 4096, "float16", "programmatic") == "1=decode_b"
    (found,) = table.of_layer(4096, 4096, "float16")
    assert (found.speedup("plain"), found.speedup("programmatic")) == (14 / 8, 2.0)
    assert times([found], 1, "programmatic") == (7.0, 14.0)


def test_times_between_rows_are_interpolated_and_beyond_the_last_bucket_proportional():
    rows = [row(4, 8.0, 16.0), row(64, 32.0, 16.0)]
    assert times(rows, 1) == (8.0, 16.0)
    assert times(rows, 64) == (32.0, 16.0)
    assert times(rows, 16) == pytest.approx((16.0, 16.0))  # the middle of 4 and 64 in logarithms
    assert times(rows, 65) is None
    assert times([], 1) is None
    assert times([row(BUCKETS[-1], 400.0, 500.0)], 2 * BUCKETS[-1]) == (800.0, 1000.0)


# --- the search --------------------------------------------------------------------------------------------

TIMES = {  # microseconds of each candidate as a function of M
    "decode_fast": lambda m: 7.0 + 0.1 * m,
    "decode_close": lambda m: 7.2 + 0.2 * m,
    "wide": lambda m: 40.0 + 0.02 * m,
    "reference": lambda m: 900.0 * m,
}


class Library:
    """Stands for `Kernels`."""

    version, kernel_set = "0.1.0", "abc123"
    candidates = tuple(TIMES)

    def supporting(self, problem: Problem, gpu):
        return [name for name in TIMES if problem.m <= 16 or not name.startswith("decode")]


class PlayedLayer(tune.Layer):
    """A layer whose replays are only (candidate, M, launch)."""

    def __init__(self, kernels, gpu, n, k, dtype, rows):
        self.kernels, self.gpu, self.n, self.k, self.dtype = kernels, gpu, n, k, dtype

    def replay(self, m, candidate, *, programmatic=False, **options):
        return candidate, m, "programmatic" if programmatic else "plain"

    def dense_replay(self, m):
        return "dense", m, "plain"


def played_us(candidate, m, launch):
    """Programmatic dependent launch saves 2 us, and 1 us more of decode_close."""
    if candidate == "dense":
        return 14.0 + 0.05 * m
    saved = 3.0 if candidate == "decode_close" else 2.0
    return TIMES[candidate](m) - (saved if launch == "programmatic" else 0.0)


def names(measured):
    return [candidate for candidate, *_ in measured]


@pytest.fixture
def played(monkeypatch):
    """The tuner on played times; yields what was measured together, (candidate, M, launch) each."""
    measured = []

    def measure(contestants, **limits):
        measured.append(list(contestants.values()))
        return {key: timing.Timing(*[played_us(*replay)] * 3) for key, replay in contestants.items()}

    class NoStream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "stream", lambda: None)
    monkeypatch.setattr(tune.torch.cuda, "stream", lambda stream: NoStream())
    monkeypatch.setattr(tune, "Layer", PlayedLayer)
    return measured


def test_the_fastest_candidate_wins_each_cell_and_only_close_ones_are_timed_again(played, tmp_path):
    table = make_table()
    tune.tune(Library(), table, tmp_path / "t.json", [(4096, 4096)], tokens=(1, 16, 64))
    rows = {m: table.rows[4096, 4096, "float16", m] for m in (1, 16, 64)}
    assert {m: r.plain.kernel for m, r in rows.items()} == {1: "decode_fast", 16: "decode_fast", 64: "wide"}
    assert rows[1].programmatic == Best("decode_close", 4.4, 4.4, 4.4)
    assert rows[64].programmatic == Best("wide", 39.28, 39.28, 39.28)
    assert rows[1].dense == Best(tune.DENSE, 14.05, 14.05, 14.05)
    final = [found for found in played if "dense" in names(found)]
    assert set(final[0]) == {
        ("dense", 1, "plain"),
        ("decode_fast", 1, "plain"),
        ("decode_close", 1, "plain"),
        ("decode_close", 1, "programmatic"),  # decode_fast is 15 % behind it there
    }
    assert names(final[2]) == ["dense", "wide", "wide"]
    assert not any("reference" in names(found) for found in played)


def test_a_hopeless_candidate_is_launched_but_a_few_times(played, tmp_path):
    tune.tune(Library(), make_table(), tmp_path / "t.json", [(64, 64)], tokens=(1, 16))
    sieve, quick, *_ = (names(found) for found in played)
    assert (sieve, quick) == (["decode_fast", "decode_close", "wide"], ["decode_fast", "decode_close"])
    sieve = names(played[4])
    assert sieve == ["decode_fast", "decode_close", "wide"]  # at other numbers of tokens it may win


def test_few_tokens_have_three_finalists():
    quick = {"d": 13.0, "c": 10.2, "a": 10.0, "b": 10.1}
    assert tune.finalists(16, quick) == ["a", "b", "c"]
    assert tune.finalists(16, {"a": 10.0, "b": 11.1, "c": 11.3}) == ["a", "b"]


def test_many_tokens_have_more_finalists_but_one_for_each_kernel():
    orders = {f"cutlass_256x128_c12_w{order}": 10.0 + i / 10 for i, order in enumerate(("2m", "1n", "1m"))}
    others = {f"wgmma_n{rows}m256_x2": 10.05 + rows / 1000 for rows in range(64, 1024, 64)}
    found = tune.finalists(512, {**others, "cutlass_128x128_c12_w1m": 11.0, **orders})
    assert found[0] == "cutlass_256x128_c12_w2m" and found[1] == "wgmma_n64m256_x2"
    assert len(found) == 8 and not set(found) & {"cutlass_256x128_c12_w1n", "cutlass_256x128_c12_w1m"}
    assert tune.finalists(512, {"cutlass_128x128_c12_w1m": 11.0, **orders}) == [
        "cutlass_256x128_c12_w2m", "cutlass_128x128_c12_w1m",
    ]  # fmt: skip


def test_a_tuner_that_was_stopped_goes_on_where_it_was(played, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    saves = []
    save = Table.save

    def save_twice(table, path):
        save(table, path)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Table, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(Library(), make_table(), path, [(64, 64), (128, 64)], tokens=(1, 16))
    assert [r["m"] for r in json.loads(path.read_text())["rows"]] == [1, 16]
    played.clear()
    table = tune.open_table(path, Library(), H100)
    tune.tune(Library(), table, path, [(64, 64), (128, 64)], tokens=(1, 16))
    assert len(played) == 2 * 4  # two cells: the sieve, a quick pass of each kind, and the last one
    assert len(load_table(path).rows) == 4


def test_the_reference_is_timed_where_nothing_else_runs(played, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "supporting", lambda self, problem, gpu: ["reference"])
    table = make_table()
    tune.tune(Library(), table, tmp_path / "t.json", [(64, 64)], tokens=(1,))
    assert table.rows[64, 64, "float16", 1].plain.kernel == "reference"


# --- which layers, and the command -------------------------------------------------------------------------


def test_layers_that_read_the_same_tensor_are_one_gemm():
    shapes = tuning.layer_shapes(load_recipe(QUICKSTART), None)
    assert {shape: names[0] for shape, names in shapes.items()} == {
        (512, 256): "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        (256, 256): "model.layers.0.self_attn.o_proj",
        (1536, 256): "model.layers.0.mlp.gate_proj+up_proj",
        (256, 768): "model.layers.0.mlp.down_proj",
    }
    assert all(len(names) == 6 for names in shapes.values())


def test_layers_that_would_not_be_packed_are_not_measured(tiny_recipe):
    shapes = tuning.layer_shapes(load_recipe(tiny_recipe), None)
    assert list(shapes) == [(64, 128)]  # padded metadata makes those with K = 64 too large


def test_no_recipe_and_no_shape_is_an_error():
    with pytest.raises(EsparseError, match="no layers are named"):
        tuning.layer_shapes(None, None)
    with pytest.raises(EsparseError, match="'4096' is not a shape"):
        tuning.parse_shape("4096")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "words"),
    [(4096, 48, "float16", "K = 48"), (64, 64, "float32", "float16 or bfloat16"), (64, 64, "int7", "int7")],
)
def test_what_has_no_kernels_is_refused_before_anything_runs(n, k, dtype, words):
    with pytest.raises(EsparseError, match=words):
        tuning.require_kernels(n, k, dtype)


@pytest.mark.skipif(tune.torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu_or_library_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning.library, "load", Library)
    result = CliRunner().invoke(app, ["tune", "--shape", "4096x4096", "--table", str(tmp_path / "t.json")])
    assert result.exit_code == 2
    assert "this measures an NVIDIA GPU" in result.output
    monkeypatch.undo()
    monkeypatch.setenv("ESPARSE_LIBRARY_DIR", str(tmp_path))
    tuning.library.load.cache_clear()
    result = CliRunner().invoke(app, ["tune", "--shape", "4096x4096"])
    assert result.exit_code == 2
    assert "libesparse_kernels.so was not found" in result.output
    assert not (tmp_path / "t.json").exists()
