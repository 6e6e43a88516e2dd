"""Tests the fixed quantiser: nearest patches, and a palette by k-means."""

import jax
import numpy as np
import pytest

from wamjax.models import palette
from wamjax.models.codec import PixelCodec
from wamjax.models.palette import Palette


def pictures(seed=0, n=6, size=8):
    """Draws a few colours on a background, so that patches repeat."""
    rng = np.random.default_rng(seed)
    video = np.full((n, 2, size, size, 3), 90, np.uint8)
    for clip in video:
        y, x = rng.integers(0, size - 3, 2)
        clip[:, y : y + 3, x : x + 3] = rng.choice([0, 128, 255], 3)
    return video


def test_a_token_is_the_nearest_patch():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    table = np.random.default_rng(1).integers(0, 256, (7, 48)).astype(np.uint8)
    codec = Palette(4, codes=table.tobytes())
    ids = np.asarray(jax.jit(codec.tokens)(video))
    assert codec.vocabulary == 7 and ids.shape == (2, *codec.shape(3, 8, 8)[:3])
    for index in np.ndindex(*ids.shape):
        b, f, y, x = index
        patch = video[b, f, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(-1).astype(float)
        assert ids[index] == np.square(table - patch).sum(axis=1).argmin()
    seen = np.asarray(codec.decode(codec.from_tokens(ids)))
    np.testing.assert_array_equal(seen[0, 0, :4, :4].reshape(-1), table[ids[0, 0, 0, 0]])
    np.testing.assert_array_equal(codec.encode(video), codec.from_tokens(ids))
    np.testing.assert_array_equal(codec.tokens(seen), ids)  # decoding loses nothing more
    assert codec == Palette(4, codes=table.tobytes()) and hash(codec) == hash(
        Palette(4, codes=table.tobytes())
    )


def test_k_means_finds_the_existing_patches_and_beats_random_ones():
    video = pictures(n=40)
    made = palette.fit(video, 4, 24)
    assert made.dtype == np.uint8 and made.shape[1] == 48 and 12 < len(made) <= 24
    rng = np.random.default_rng(0)
    patches = video.reshape(80, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 48)
    distinct = np.unique(patches, axis=0)
    errors = {}
    for name, table in {
        "fitted": made,
        "random": distinct[rng.choice(len(distinct), 24, replace=False)],
    }.items():
        codec = Palette(4, codes=table.tobytes())
        errors[name] = np.square(codec.encode(video) - PixelCodec(4).encode(video)).mean()
    assert errors["fitted"] < 0.6 * errors["random"]
    with pytest.raises(ValueError, match=f"{len(distinct)} distinct patches, too few for 99"):
        palette.fit(video, 4, 99)


def test_a_palette_is_made_once_and_fits_only_its_patch_size(tmp_path):
    path = tmp_path / "new" / "palette.npy"
    first = palette.ensure(path, pictures, 4, 6)
    assert [f.name for f in path.parent.iterdir()] == ["palette.npy"]
    assert palette.ensure(path, None, 4, 6) == first and first.vocabulary <= 6
    with pytest.raises(ValueError, match=r"uint8 of shape \(\d, 48\), not a palette: with patch 2"):
        palette.ensure(path, None, 2, 6)
