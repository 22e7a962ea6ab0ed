"""Token windows: the protocol, every source, and every way in which a text can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import struct
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from esparse_trt import model as models
from esparse_trt import text
from esparse_trt.errors import EsparseError
from esparse_trt.sections import TextDataset, TextFile, TextSelf

BOS, EOS = 0, 1


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Data sets prepared by these tests do not land in the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(tiny_llama)


@pytest.fixture
def numbers(tmp_path: Path) -> TextFile:
    """A text in which every line is different, so that every window is."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(2000)), encoding="utf-8")
    return TextFile(path=path)


def encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def fails(call, *parts: str) -> None:
    with pytest.raises(EsparseError) as caught:
        call()
    assert caught.value.fix
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --- windows -------------------------------------------------------------------------------------------


def test_calibration_windows_are_disjoint_pieces_of_the_text(numbers, tokenizer) -> None:
    windows = text.token_windows(numbers, tokenizer, samples=50, length=64, seed=3)
    assert (windows.shape, windows.dtype) == ((50, 64), torch.int64)
    assert (windows[:, 0] == BOS).all()
    stream = encode(tokenizer, numbers.path.read_text())
    places = {tuple(stream[i : i + 63]): i for i in range(len(stream))}
    starts = [places[tuple(window[1:].tolist())] for window in windows]
    positions = sorted(starts)
    assert min(b - a for a, b in itertools.pairwise(positions)) >= 63
    assert positions[-1] > len(stream) / 2 and starts != positions  # all over the text, in random order


def test_the_seed_decides(numbers, tokenizer) -> None:
    def windows(seed: int) -> torch.Tensor:
        return text.token_windows(numbers, tokenizer, samples=8, length=32, seed=seed)

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))
    assert text.tokens_sha256(windows(0)) == text.tokens_sha256(windows(0)) != text.tokens_sha256(windows(1))


def test_evaluation_windows_are_consecutive_and_the_rest_is_dropped(numbers, tokenizer) -> None:
    stream = [*encode(tokenizer, numbers.path.read_text()), EOS]
    windows = text.evaluation_windows(numbers, tokenizer, length=100)
    assert windows.shape == (len(stream) // 99, 100)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == stream[: len(windows) * 99]
    assert torch.equal(text.evaluation_windows(numbers, tokenizer, length=100, samples=3), windows[:3])
    assert len(text.evaluation_windows(numbers, tokenizer, length=100, samples=10**6)) == len(windows)


def test_without_bos_and_eos_windows_are_text_only(numbers, tiny_llama) -> None:
    tokenizer = models.load_tokenizer(tiny_llama)
    tokenizer.bos_token = tokenizer.eos_token = None
    windows = text.evaluation_windows(numbers, tokenizer, length=100)
    stream = encode(tokenizer, numbers.path.read_text())
    assert windows.flatten().tolist() == stream[: windows.numel()]


def test_long_text_is_cut_at_line_ends_without_changing_its_tokens(tmp_path, tokenizer) -> None:
    path = tmp_path / "long.txt"
    string = "".join(f"Paragraph {i}:\n  indented text, number {i * 7}\n\n" for i in range(6000))
    assert len(string) > 3 * 65536
    path.write_text(string)
    windows = text.evaluation_windows(TextFile(path=path), tokenizer, length=50)
    assert windows[:, 1:].flatten().tolist() == encode(tokenizer, string)[: len(windows) * 49]


def test_tokens_sha256_is_over_little_endian_int64() -> None:
    ids = torch.tensor([[1, 2], [3, 70000]], dtype=torch.int32)
    assert text.tokens_sha256(ids) == hashlib.sha256(struct.pack("<4q", 1, 2, 3, 70000)).hexdigest()


# --- files ---------------------------------------------------------------------------------------------


def test_too_short_text_gives_the_tokens_there_are_and_are_needed(numbers, tokenizer) -> None:
    there = len(encode(tokenizer, numbers.path.read_text())) + 1
    fails(
        lambda: text.token_windows(numbers, tokenizer, samples=5000, length=64, seed=0),
        f"{there} tokens", f"need {5000 * 63}", f"calibration.samples: {there // 63} at most", "numbers.txt",
    )  # fmt: skip
    fails(lambda: text.evaluation_windows(numbers, tokenizer, length=10**6), f"{there} tokens", "999999")


def test_missing_empty_and_foreign_files(tmp_path, tokenizer) -> None:
    def read(name: str):
        source = TextFile(path=tmp_path / name)
        return lambda: text.token_windows(source, tokenizer, samples=1, length=8, seed=0)

    fails(read("none.txt"), "none.txt", "No such file")
    fails(read("."), "Is a directory")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    fails(read("empty.txt"), "empty.txt", "the text is empty")
    fails(read("blank.txt"), "the text is empty")
    (tmp_path / "latin1.txt").write_bytes(b"plain " * 100 + "é".encode("latin1"))
    fails(read("latin1.txt"), "latin1.txt", "byte 0xe9 at offset 600", "iconv")


# --- data sets: the real loading code on local files ------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"body": f"Document {i} has the number {i * 31}. " * 4, "id": i} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def source_of(path: Path, **options) -> TextDataset:
    options = {"name": "json", "data_files": [str(path)], "column": "body"} | options
    return TextDataset(source="dataset", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_documents_with_eos_between_them(jsonl, tokenizer, streaming: bool) -> None:
    source = source_of(jsonl, streaming=streaming)
    windows = text.evaluation_windows(source, tokenizer, length=64, samples=20)
    rows = [json.loads(line)["body"] for line in jsonl.read_text().splitlines()]
    stream = [token for row in rows for token in [*encode(tokenizer, row), EOS]]
    assert windows[:, 1:].flatten().tolist() == stream[: 20 * 63]


def test_rows_as_lines_are_one_text_joined_by_blank_lines(tmp_path, tokenizer) -> None:
    rows = ["", " = Title = \n", "First paragraph.\n", "", "Second.\n"] * 30
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    source = source_of(path, name="parquet", column="text", rows="lines")
    windows = text.evaluation_windows(source, tokenizer, length=40)
    expected = encode(tokenizer, "\n\n".join(rows))
    assert windows[:, 1:].flatten().tolist() == expected[: len(windows) * 39]


PARAGRAPHS = [
    f" = Title {i} = \n" if i % 5 == 0 else f" Paragraph {i} of <unk> words . \n" for i in range(200)
]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Copies of three data sets in small, with the files and columns that they have on the hub."""
    configs = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": [
        {"split": "test", "path": "wikitext-2-raw-v1/test-*.parquet"}]}]}  # fmt: skip
    wikitext, c4, ptb = (tmp_path / name for name in ("wikitext", "c4", "ptb_text_only"))
    for folder in (wikitext / "wikitext-2-raw-v1", c4 / "en", ptb / "test"):
        folder.mkdir(parents=True)
    (wikitext / "README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n")
    datasets.Dataset.from_dict({"text": PARAGRAPHS}).to_parquet(
        wikitext / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    )
    pages = [
        {"text": line.strip(), "timestamp": "2019", "url": f"https://{i}"}
        for i, line in enumerate(PARAGRAPHS)
    ]
    with gzip.open(c4 / "en" / "c4-validation.00000-of-00008.json.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, pages)))
    datasets.Dataset.from_dict({"sentence": PARAGRAPHS}).to_parquet(ptb / "test" / "0000.parquet")
    return tmp_path


@pytest.mark.parametrize(
    "options, joined",
    [
        ({"name": "wikitext", "config": "wikitext-2-raw-v1", "split": "test", "rows": "lines"}, True),
        ({"name": "c4", "data_files": ["en/c4-validation.00000-of-00008.json.gz"]}, False),
        ({"name": "ptb_text_only", "split": "test", "column": "sentence", "rows": "lines"}, True),
    ],
    ids=["WikiText-2", "C4", "PTB"],
)
def test_the_texts_of_the_literature_from_a_local_copy(
    hub: Path, tokenizer, options: dict, joined: bool
) -> None:
    source = TextDataset(source="dataset", **options | {"name": str(hub / options["name"])})
    windows = text.evaluation_windows(source, tokenizer, length=64, samples=16)
    lines = PARAGRAPHS if joined else [line.strip() for line in PARAGRAPHS]
    stream = encode(tokenizer, "\n\n".join(lines)) if joined else [
        token for line in lines for token in [*encode(tokenizer, line), EOS]
    ]  # fmt: skip
    assert len(windows) == 16 and (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == stream[: 16 * 63]


def test_independent_rows_are_shuffled_before_calibration_reads_the_first_of_them(jsonl, tokenizer) -> None:
    def ids(seed: int, **options) -> set[str]:
        source = source_of(jsonl, **options)
        windows = text.token_windows(source, tokenizer, samples=4, length=64, seed=seed)
        return set(tokenizer.batch_decode(windows))

    assert ids(0) == ids(0) != ids(1)
    first_rows = " ".join(ids(0, streaming=True))
    assert "Document 399" not in first_rows  # a stream is read in order, no further than needed


def test_a_row_limit_is_kept(jsonl, tokenizer) -> None:
    one = len(encode(tokenizer, json.loads(jsonl.read_text().splitlines()[0])["body"])) + 1
    source = source_of(jsonl, documents=1)
    fails(lambda: text.evaluation_windows(source, tokenizer, length=500), f"has {one} tokens")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_those_there_are(jsonl, tokenizer, streaming: bool) -> None:
    source = source_of(jsonl, column="text", streaming=streaming)
    fails(lambda: text.evaluation_windows(source, tokenizer, length=8), "no column 'text'", "body, id")


def test_a_column_that_is_no_text_is_refused(jsonl, tokenizer) -> None:
    source = source_of(jsonl, column="id")
    fails(lambda: text.evaluation_windows(source, tokenizer, length=8), "'id' holds int")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"split": "valid"}, "valid"),
        ({"data_files": ["/nowhere/none.json"]}, "/nowhere/none.json"),
        ({"name": "example/not-in-the-cache", "data_files": None}, "network"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_says_why(jsonl, tokenizer, options: dict, part: str) -> None:
    source = source_of(jsonl, **options)
    fails(lambda: text.evaluation_windows(source, tokenizer, length=8), "cannot load the data set", part)


# --- the model's own text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    return models.load_model(tiny_llama, torch.float32)


def sample(model, tokenizer, *, seed: int = 0, temperature: float = 1.0, samples: int = 20) -> torch.Tensor:
    source = TextSelf(source="self", temperature=temperature)
    return text.token_windows(source, tokenizer, samples=samples, length=12, seed=seed, model=model)


def test_the_model_writes_its_own_text_from_bos_by_seed(model, tokenizer) -> None:
    windows = sample(model, tokenizer)
    assert windows.shape == (20, 12)  # more than one batch
    assert (windows[:, 0] == BOS).all() and len(windows.unique(dim=0)) == 20
    assert torch.equal(windows, sample(model, tokenizer))
    assert not torch.equal(windows, sample(model, tokenizer, seed=1))


def test_sampling_follows_the_model_s_distribution(model, tokenizer) -> None:
    """Nearly cold sampling is greedy decoding, which does not need a cache to be computed."""
    windows = sample(model, tokenizer, temperature=1e-4, samples=2)
    with torch.inference_mode():
        greedy = model(windows).logits.argmax(-1)
    assert torch.equal(windows[:, 1:], greedy[:, :-1])


def test_nan_in_the_model_s_own_text_is_found(tiny_llama, tokenizer) -> None:
    broken = models.load_model(tiny_llama, torch.float32)
    broken.model.norm.weight.data[0] = float("nan")
    fails(lambda: sample(broken, tokenizer), "NaN or Inf after 1 tokens")


def test_self_needs_the_model_and_a_first_token(model, tiny_llama) -> None:
    tokenizer = models.load_tokenizer(tiny_llama)
    with pytest.raises(ValueError, match="pass it"):
        sample(None, tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    fails(lambda: sample(model, tokenizer), "neither BOS nor EOS")
