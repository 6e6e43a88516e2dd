"""Tests tokenizers against transformers, on a sentencepiece model that is trained here."""

import html
import random
import sys
import types

import numpy as np
import pytest

from wamjax.models import tokenizer

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

WORDS = (
    "the red blue green block cube robot arm put pick place on in left right zone drawer open "
    "close bottle café naïve ﬁne Ⅳ push slide move to of and a 12 3 straße 机器人 拿起 杯子"
).split()
TEXTS = (
    "put the red block on the left zone",
    "  put   the red\tblock\n on ",
    "café ﬁne Ⅳ straße naïve",
    "机器人 拿起\u3000杯子",
    "zzz Q ☃ put",
    "▁put▁red",
    "put\u00a0red a\u200bb",
    "Put THE 12 blocks, & open it's drawer!",
    "",
    " ",
    " ".join(WORDS),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with only spiece.model."""
    path = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    lines = "\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(2000))
    (path / "corpus.txt").write_text(lines)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"), model_prefix=str(path / "spiece"), vocab_size=200,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (path / "corpus.txt").unlink()
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.T5Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def json_file(folder, reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("json")
    # A published file may have its own settings for these; they must have no effect.
    reference.backend_tokenizer.enable_truncation(3)
    reference.backend_tokenizer.enable_padding(length=50)
    reference.backend_tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(scope="module", params=["model", "json"])
def ours(request, folder, json_file):
    return tokenizer.load(folder if request.param == "model" else json_file)


@pytest.mark.parametrize("length", [1, 2, 6, 64])
def test_ids_and_mask_are_those_of_transformers(ours, reference, length):
    want = reference(
        list(TEXTS), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    ids, mask = ours(TEXTS, length)
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == (len(TEXTS), length)
    assert np.array_equal(ids, want["input_ids"])
    assert np.array_equal(mask, want["attention_mask"].astype(bool))


def test_random_text_tokenizes_alike(ours, reference):
    draw = random.Random(1)
    letters = [chr(i) for i in range(32, 127)] + list("éßﬁⅣ机☃ \u3000\u00a0")
    texts = [" ".join(draw.choices(WORDS, k=3)) + "".join(draw.choices(letters, k=9))
             for _ in range(300)]  # fmt: skip
    want = reference(texts, padding="max_length", truncation=True, max_length=24)["input_ids"]
    assert np.array_equal(ours(texts, 24)[0], want)


def test_text_ends_with_its_end_of_sentence_and_then_padding(ours):
    ids, mask = ours(TEXTS, 12)
    for row, real in zip(ids, mask, strict=True):
        assert row[real][-1] == ours.eos and (row[real][:-1] != ours.eos).all()
        assert (row[~real] == ours.pad).all()
    assert mask[TEXTS.index("")].sum() == 1 and mask[-1].all()
    assert ids.max() < ours.size and len(ours([], 4)[0]) == 0


def test_special_tokens_in_text_are_refused(ours, reference):
    for name in ("</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>"):
        # Exactly the texts that transformers reads as a single token are refused.
        assert len(reference(name)["input_ids"]) == 2
        with pytest.raises(ValueError, match=f"'put {name} red' contains '{name}'.*remove"):
            ours([f"put {name} red"], 8)
    assert ours(["put <b> red </b>"], 8)[1].any()


def test_a_folder_and_its_file_are_the_same(folder, json_file, tmp_path):
    pieces = tokenizer.load(folder)(TEXTS, 9)[0]
    assert np.array_equal(pieces, tokenizer.load(folder / "spiece.model")(TEXTS, 9)[0])
    assert np.array_equal(pieces, tokenizer.load(json_file.parent)(TEXTS, 9)[0])
    with pytest.raises(FileNotFoundError, match="no tokenizer file .spiece.model or"):
        tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer file .*nothing.model"):
        tokenizer.load(tmp_path / "nothing.model")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spiece.model", "no model", "spiece.model cannot be read as a sentencepiece model"),
        ("tokenizer.json", "no json", "as a tokenizer.json"),
        ("tokenizer.json", '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}',
         "lacks <pad> or </s>"),
    ],
)  # fmt: skip
def test_another_file_is_an_error_that_names_it(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path / name)


def test_wrong_arguments(ours):
    with pytest.raises(TypeError, match="not the text 'put': pass a list"):
        ours("put", 8)
    with pytest.raises(ValueError, match="length 0 must be at least 1"):
        ours(["put"], 0)


@pytest.mark.parametrize("library", ["sentencepiece", "tokenizers"])
def test_a_missing_library_is_an_error_that_names_the_extra(
    folder, json_file, monkeypatch, library
):
    monkeypatch.setitem(sys.modules, library, None)
    path = folder if library == "sentencepiece" else json_file
    with pytest.raises(ImportError, match=rf"needs {library}: pip install 'wamjax\[text\]'"):
        tokenizer.load(path)


def test_cleaning_is_wans(monkeypatch, folder, reference):
    dirty = " put\t the\n\n red  &  blue<block> \r\n"
    assert tokenizer.clean_text(dirty) == "put the red & blue<block>"
    cleaned = tokenizer.load(folder, clean=True)
    assert np.array_equal(cleaned([dirty], 9)[0], cleaned(["put the red & blue<block>"], 9)[0])
    # Any text that ftfy might change goes through it, in the order of the public code.
    monkeypatch.setitem(sys.modules, "ftfy", None)
    for text in ("café", "a\x0bb", "a\x1b[36mb", "&lt;b", "&#39;", "\u200b"):
        with pytest.raises(ImportError, match="the cleaning of .* needs ftfy"):
            tokenizer.clean_text(text)
    calls = []
    fake = types.SimpleNamespace(fix_text=lambda text: calls.append(text) or text.upper())
    monkeypatch.setitem(sys.modules, "ftfy", fake)
    text = " caf&eacute;  &amp;AMP;gt; "
    want = " ".join(html.unescape(html.unescape(text.upper())).split())
    assert tokenizer.clean_text(text) == want and calls == [text]
