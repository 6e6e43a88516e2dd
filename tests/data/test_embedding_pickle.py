"""Tests caches of Cosmos Policy's published text embeddings; malicious pickles are refused."""

import os
import pickle
import types

import numpy as np
import pytest
from absl import app
from data import synthetic

from wamjax.data import embedding_pickle, embeddings
from wamjax.data.embeddings import EmbeddingCache, Settings

torch = pytest.importorskip("torch")
TEXTS = {"put the red bowl on the plate": 5, "open the drawer / close it": 3}


def published(rows=12, width=6):
    """Returns an embedding as in the public code: (1, rows, width) bfloat16, zero after the
    tokens."""
    torch.manual_seed(0)
    out = {}
    for text, count in TEXTS.items():
        out[text] = torch.randn(1, rows, width).bfloat16()
        out[text][:, count:] = 0
    return out


def save(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def run(*arguments):
    with synthetic.command(embeddings, *arguments):
        embeddings.main([""])


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_command_makes_a_cache_of_the_published_file(tmp_path, capsys, protocol):
    values, file = published(), tmp_path / "t5.pkl"
    save(file, values, protocol)
    run(f"--cache={tmp_path}/c", f"--pickle={file}", "--encoder=t5-11b", "--length=8")
    cache = EmbeddingCache(tmp_path / "c")
    assert cache.settings == Settings("t5-11b", 8) and cache.width == 6 and len(cache) == 2
    for text, count in TEXTS.items():
        got = cache.lookup(text)
        assert got.shape == (8, 6) and not got[count:].any()
        np.testing.assert_array_equal(got.astype(np.float32), values[text][0, :8].float().numpy())
    assert "2 taken, 2 in all, 6 wide" in capsys.readouterr().out
    run(f"--cache={tmp_path}/c", f"--pickle={file}")
    assert "0 taken, 2 in all" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "c").iterdir() if p.suffix not in (".json", ".safetensors")]


def test_rows_are_not_cut_and_widths_not_mixed(tmp_path):
    file = save(tmp_path / "t5.pkl", published())
    with pytest.raises(ValueError, match="1 embeddings have more than --length=4 .* has 5"):
        run(f"--cache={tmp_path}/c", f"--pickle={file}", "--encoder=t5-11b", "--length=4")
    assert not (tmp_path / "c").exists()
    run(f"--cache={tmp_path}/c", f"--pickle={file}", "--encoder=t5-11b", "--length=8")
    wide = save(tmp_path / "wide.pkl", {"new": torch.ones(1, 3, 7)})
    with pytest.raises(ValueError, match="wide.pkl has width 7, the cache in .*/c has 6"):
        run(f"--cache={tmp_path}/c", f"--pickle={wide}")
    long = save(tmp_path / "long.pkl", {"new": torch.ones(1, 9, 6)})
    with pytest.raises(ValueError, match="more than --length=8 rows that are not zero; 'new' has"):
        run(f"--cache={tmp_path}/c", f"--pickle={long}")
    for arguments in ((), (f"--pickle={file}", "--encode=a:b")):
        with pytest.raises(app.UsageError, match="give one of --encode and --pickle"):
            run(f"--cache={tmp_path}/c", *arguments)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": torch.ones(1, 2, 3), "b": Harm()}, "system, which is neither a tensor nor plain"),
        ({"a": types.SimpleNamespace(x=1)}, "types.SimpleNamespace, which is neither"),
        ({"a": np.ones((1, 2, 3))}, "numpy.*, which is neither"),
        ([torch.ones(1, 2, 3)], "a list, not a dict of embeddings by instruction"),
        ({}, "an empty dict, not a dict"),
        ({"a": "text", "b": torch.ones(4)}, r"(?s)'a': a str.*'b': a tensor \(4,\) of float32"),
        ({3: torch.ones(1, 2, 3)}, "3: a tensor"),
        ({"a": torch.ones(1, 2, 3), "b": torch.ones(1, 2, 4)}, r"must have one width, .* \[3, 4\]"),
        ({"a": torch.zeros(1, 2, 3)}, "the embedding of 'a' is zero, or not finite"),
        ({"a": torch.full((1, 2, 3), torch.nan)}, "is zero, or not finite"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    file = save(tmp_path / "x.pkl", value)
    with pytest.raises(ValueError, match=message):
        embedding_pickle.read(file)
    assert not (tmp_path / "harmed").exists()
