"""Tests the cache of text embeddings, and its file format."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest
from absl import app
from data import synthetic

from wamjax.data import embeddings, pipeline, stand_in, tensors
from wamjax.data.embeddings import EmbeddingCache, Settings, fill

TEXTS = ["lift the block", "open it", "put the red block on the left zone of it", "open it"]


class Encoder:
    """Returns different rows for every position and prompt; rows after the tokens are not zero."""

    def __init__(self, length=6, width=4, fail_at=None):
        self.length, self.width, self.fail_at = length, width, fail_at
        self.calls = []

    def __call__(self, prompts):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        values = np.stack([self.row(p) for p in prompts])
        counts = np.array([self.tokens(p) for p in prompts])
        return values, np.arange(self.length) < counts[:, None]

    def tokens(self, prompt):
        return min(len(prompt.split()) + 1, self.length)

    def row(self, prompt):
        rng = np.random.default_rng(list(prompt.encode()))
        return rng.normal(size=(self.length, self.width)).astype(np.float32)


def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)


def create(path, length=6, **changes):
    return EmbeddingCache.create(path, Settings("toy", length, **changes))


def test_rows_after_the_tokens_are_zero_and_the_others_those_of_the_encoder(tmp_path):
    """The published semantics (Wan, Fast-WAM, Cosmos): padding rows are zero, not the encoder's."""
    cache, encoder = create(tmp_path / "c"), Encoder()
    assert fill(cache, TEXTS, encoder, progress=False) == 3
    for text in TEXTS:
        n, got = encoder.tokens(text), EmbeddingCache(cache.path).lookup(text)
        assert got.shape == (6, 4) and got.dtype == ml_dtypes.bfloat16
        assert np.array_equal(got[:n], bf16(encoder.row(text))[:n]) and not got[n:].any()
    assert {encoder.tokens(t) for t in TEXTS} == {3, 4, 6}  # the longest one is cut


def test_padding_can_be_kept_as_the_encoder_gives_it(tmp_path):
    cache, encoder = create(tmp_path / "c", padding="keep"), Encoder()
    fill(cache, TEXTS, encoder, progress=False)
    for text in TEXTS:
        assert np.array_equal(cache.lookup(text), bf16(encoder.row(text)))


def test_only_what_is_missing_is_encoded_in_batches_of_one_size(tmp_path):
    cache, encoder = create(tmp_path / "c"), Encoder()
    assert fill(cache, TEXTS[:1], encoder, batch_size=2, progress=False) == 1
    assert fill(cache, [*TEXTS, "a", "b"], encoder, batch_size=2, progress=False) == 4
    assert fill(cache, TEXTS, encoder, progress=False) == 0
    assert [len(call) for call in encoder.calls] == [2, 2, 2]
    seen = [text for call in encoder.calls for text in dict.fromkeys(call)]
    assert sorted(seen) == sorted({*TEXTS, "a", "b"}) and len(cache) == 5
    assert TEXTS[0] in cache and "c" not in cache and cache.missing(["c", "a", "c"]) == ["c"]


def test_what_was_encoded_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 4)
    texts, encoder = [f"task {i}" for i in range(12)], Encoder(fail_at=3)
    cache = create(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        fill(cache, texts, encoder, batch_size=2, progress=False)
    again = EmbeddingCache(tmp_path / "c")
    assert again.missing(texts) == texts[6:]  # only the complete file counts
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 2
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]
    assert fill(again, texts, Encoder(), batch_size=2, progress=False) == 6
    for text in texts:
        n = Encoder().tokens(text)
        assert np.array_equal(again.lookup(text)[:n], bf16(Encoder().row(text))[:n])


def test_an_unfinished_file_is_not_read(tmp_path, monkeypatch):
    cache = create(tmp_path / "c")

    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("wamjax.files.os.replace", killed)
    with pytest.raises(RuntimeError, match="killed"):
        cache.add({"a": np.ones((2, 4))})
    monkeypatch.undo()
    assert len(EmbeddingCache(tmp_path / "c")) == 0


@pytest.mark.parametrize(
    "other",
    [{"encoder": "t5"}, {"length": 7}, {"padding": "keep"}, {"template": "do: {instruction}"}],
)
def test_an_embedding_is_never_taken_for_that_of_other_settings(tmp_path, other):
    settings = {"encoder": "toy", "length": 6}
    cache = EmbeddingCache.create(tmp_path / "a", Settings(**settings))
    second = EmbeddingCache.create(tmp_path / "b", Settings(**settings | other))
    fill(cache, TEXTS, Encoder(), progress=False)
    for file in (tmp_path / "a").glob("*.safetensors"):  # of one cache, in the other's folder
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    second = EmbeddingCache(tmp_path / "b")
    assert len(second) == 3 and second.missing(TEXTS) == list(dict.fromkeys(TEXTS))
    with pytest.raises(
        ValueError, match=f"a is a cache with other settings: .*{next(iter(other))}"
    ):
        EmbeddingCache.create(tmp_path / "a", Settings(**settings | other))


def test_the_encoder_gets_the_prompt(tmp_path):
    cache, encoder = create(tmp_path / "c", template=embeddings.FAST_WAM), Encoder(length=6)
    fill(cache, ["lift {it}"], encoder, batch_size=1, progress=False)
    assert encoder.calls == [
        ["A video recorded from a robot's point of view executing the following instruction: "
         "lift {it}"]
    ]  # fmt: skip
    assert cache.lookup("lift {it}").any()


def test_missing_embeddings_are_listed_with_the_command_that_adds_them(tmp_path):
    cache = create(tmp_path / "c")
    with pytest.raises(
        ValueError,
        match=r"(?s)in .*/c lack 12 instructions:\n  'task 0'.*'task 9'\n  ... and 2 more\nfill "
        r"them in by\n  python -m wamjax.data.embeddings --cache=.*/c --data=DEMOS --encode=",
    ):
        cache.require([f"task {i}" for i in range(12)], "DEMOS")
    with pytest.raises(
        ValueError, match="lack 1 instructions:\n  'x'.*\n.*\n.*--instructions=FILE"
    ):
        cache.lookup("x")
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)no cache of text embeddings in .*/d \(no cache.json\); make it by\n  python -m "
        "wamjax.data.embeddings --cache=.*/d .*--encoder=NAME.*config.data.embeddings",
    ):
        EmbeddingCache(tmp_path / "d")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            (np.zeros((2, 5, 4)), np.ones((2, 5))),
            r"returned embeddings \(2, 5, 4\).*\(texts, 6, width",
        ),
        ((np.zeros((1, 6, 4)), np.ones((1, 6))), "at least 2 texts"),
        ((np.zeros((2, 6, 4)), np.ones((2, 5))), r"mask \(2, 5\)"),
        ((np.zeros((2, 6, 8)), np.ones((2, 6))), "has width 8, the cache .* 4: use .*'toy'"),
        ((np.zeros((2, 6, 4)), np.array([[0, 1, 1, 0, 0, 0]] * 2)), "True for the first tokens"),
        ((np.full((2, 6, 4), np.nan), np.ones((2, 6))), "of 'a' holds non-finite"),
    ],
)
def test_the_encoders_output_is_checked(tmp_path, output, message):
    cache = create(tmp_path / "c")
    cache.add({"first": np.ones((3, 4))})
    with pytest.raises(ValueError, match=message):
        fill(cache, ["a", "b"], lambda _: output, batch_size=2, progress=False)
    assert cache.missing(["a", "b"]) == ["a", "b"]


def test_invalid_settings_and_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="padding 'zeros' is not one of zero, keep"):
        Settings("toy", 6, "zeros")
    with pytest.raises(ValueError, match="instruction.* once"):
        Settings("toy", 6, template="no place for it")
    cache = create(tmp_path / "c")
    (cache.path / "cache.json").write_text('{"encoder": 1')
    with pytest.raises(ValueError, match="cache.json cannot be read"):
        EmbeddingCache(cache.path)


# ---- in the pipeline ----


def config_with(root, length=6, width=4):
    config = synthetic.config(root, demos={"path": "demos"})
    config.model.text.kind, config.data.embeddings = "context", "text"
    config.data.instruction_length, config.model.context_width = length, width
    return config


def test_the_pipeline_serves_the_embedding_of_each_instruction(tmp_path):
    synthetic.write(tmp_path / "demos")
    texts = [f"{w} the block" for w in ("lift",)]
    cache = create(tmp_path / "text")
    config = config_with(tmp_path)
    with pytest.raises(ValueError, match="lack 1 instructions:\n  'lift the block'\n.*\n.*--data="):
        pipeline.open_data(config)
    fill(cache, texts, Encoder(), progress=False)
    batch = next(pipeline.open_data(config)[2])
    assert batch["context"].shape == (4, 6, 4) and batch["context"].dtype == ml_dtypes.bfloat16
    assert all(np.array_equal(row, cache.lookup(texts[0])) for row in batch["context"])
    assert "instruction" not in batch and "video" in batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.embeddings": ""}, "set config.data.embeddings to the folder"),
        ({"data.embeddings": "elsewhere"}, "no cache of text embeddings in .*/elsewhere"),
        ({"data.instruction_length": 7}, "config.data.instruction_length is 7, .*/text have 6"),
        ({"model.context_width": 8}, "config.model.context_width is 8, .*/text have 4"),
    ],
)
def test_a_cache_that_does_not_fit_the_config_is_named(tmp_path, changes, message):
    synthetic.write(tmp_path / "demos")
    fill(create(tmp_path / "text"), ["lift the block"], Encoder(), progress=False)
    config = config_with(tmp_path)
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.open_data(config)


def test_the_command_fills_a_cache_and_fills_it_further(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        sys.modules, "toy_encoder", types.SimpleNamespace(make=lambda weights, n: Encoder(n))
    )
    synthetic.write(tmp_path / "demos")
    (tmp_path / "more.txt").write_text("close it\n\n  open it \n")
    data, more = f"--data={tmp_path}/demos", f"--instructions={tmp_path}/more.txt"

    def run(*arguments):
        cache = f"--cache={tmp_path}/text"
        with synthetic.command(embeddings, cache, "--encode=toy_encoder:make", *arguments):
            embeddings.main([""])

    with pytest.raises(app.UsageError, match="new cache: give --encoder and --length"):
        run(data)
    run(data, "--encoder=toy", "--length=5", "--template=fast_wam")
    run(more)
    with pytest.raises(app.UsageError, match="give instructions by --data"):
        run()
    with pytest.raises(ValueError, match=r"length.*\(5, 9\)"):
        run(more, "--length=9")
    for name, message in {
        "toy_encoder": "must be of the form package.module:attribute",
        "toy_encoders:make": "No module named",
        "toy_encoder:mak": "has no 'mak', did you mean 'make'",
    }.items():
        with pytest.raises(ValueError, match=f"--encode='{name}'.*{message}"):
            run(more, f"--encode={name}")
    cache = EmbeddingCache(tmp_path / "text")
    assert cache.missing(["lift the block", "close it", "open it"]) == [] and len(cache) == 3
    assert cache.settings == Settings("toy", 5, "zero", embeddings.FAST_WAM)
    assert "2 encoded, 3 in all, 4 wide" in capsys.readouterr().out


def test_the_stand_in_encoder_tells_words_and_their_order_apart():
    encode = stand_in.text_encoder("8", 6)
    values, mask = encode(["a b", "b a", "a b"])
    assert np.array_equal(values[0], values[2]) and not np.array_equal(values[0], values[1])
    assert mask.sum(1).tolist() == [3, 3, 3] and values.shape == (3, 6, 8)


# ---- safetensors ----


def arrays():
    rng = np.random.default_rng(0)
    return {
        "b": bf16(rng.normal(size=(3, 4))),
        "u": rng.integers(0, 255, (5,), dtype=np.uint8),
        "i": rng.integers(-9, 9, (2, 1, 3)),
        "h": rng.normal(size=(7,)).astype(np.float16),
        "e": np.zeros((0, 3), np.float32),
        "t": np.array([True, False, True]),
        "transposed": rng.normal(size=(3, 5)).T,
        "scalar": np.array(2.5),
    }


def test_safetensors_round_trip_as_maps(tmp_path):
    tensors.write(tmp_path / "a.safetensors", arrays(), {"ä": "ö"})
    got, metadata = tensors.read(tmp_path / "a.safetensors")
    assert metadata == {"ä": "ö"} and list(got) == list(arrays())
    for key, want in arrays().items():
        assert got[key].dtype == want.dtype and got[key].shape == want.shape
        assert np.array_equal(got[key], want)
    assert isinstance(got["b"], np.memmap) and got["b"].ctypes.data % 8 == 0
    with pytest.raises(ValueError, match="read-only"):
        got["u"][0] = 1


def test_safetensors_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors.write(tmp_path / "a.safetensors", arrays(), {"x": "y"})
    theirs = library.load_file(tmp_path / "a.safetensors")
    assert theirs["b"].float().tolist() == arrays()["b"].astype(np.float32).tolist()
    library.save_file(theirs, tmp_path / "b.safetensors", {"q": "é"})
    ours, metadata = tensors.read(tmp_path / "b.safetensors")
    assert metadata == {"q": "é"}
    for key, want in arrays().items():
        assert ours[key].dtype == want.dtype and np.array_equal(ours[key], want), key


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "text", "dtype"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    tensors.write(file, {"x": np.arange(100.0)}, {})
    data = file.read_bytes()
    file.write_bytes({
        "empty": b"", "cut": data[:-10], "header": data[:20], "text": b"no tensors at all" * 9,
        "dtype": data.replace(b"F64", b"F65"),
    }[damage])  # fmt: skip
    with pytest.raises(ValueError, match="a.safetensors is not a safetensors file, or is cut off"):
        tensors.read(file)
    with pytest.raises(ValueError, match="'x' is complex128, which safetensors cannot hold"):
        tensors.write(file, {"x": np.ones(3, complex)}, {})
