"""Tests converted encoders in the commands that make latents and embeddings."""

import jax
import numpy as np
import pytest
from weights import test_convert

from wamjax import convert, weights
from wamjax.data import embeddings
from wamjax.models import codec as codecs
from wamjax.named import resolve
from wamjax.weights import encoders, families

T5 = dict(vocabulary=60, width=16, ffn=24, layers=2, heads=2, head_dim=8, buckets=8)
VAE = dict(width=8, decoder_width=8, blocks=1)


def converted(folder, family, config, **options):
    arrays = test_convert.published(family, dtype=np.float32, config=config)
    arrays = {k: 0.3 * x for k, x in arrays.items()}
    test_convert.save(folder / f"{family}.safetensors", arrays)
    out = folder / family
    convert.bring_in(family, folder / f"{family}.safetensors", out, config, progress=False,
                     **options)  # fmt: skip
    return out


def test_latents_are_those_of_the_codec(tmp_path):
    folder = converted(tmp_path, "wan22_vae", VAE)
    encode = resolve("wamjax.weights.encoders:video", "--encode")(str(folder))
    clip = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 64, 3), np.uint8)
    got = np.asarray(encode(clip))
    assert got.shape == (1, 2, 2, 4, 48)
    net = weights.functions("wan22_vae", VAE)
    params = weights.load("wan22_vae", folder)
    pixels = clip / np.float32(127.5) - 1
    mean = np.asarray(jax.jit(net["encode"])(params, pixels))[..., :48]
    codec = codecs.wan22()
    want = (mean - np.asarray(codec.mean)) / np.asarray(codec.std)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    lines = ["put the red block on the left zone", "open the drawer &amp; close it"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=50,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


@pytest.mark.parametrize("family, clean", [("umt5", True), ("t5", False)])
def test_a_cache_is_filled_by_a_converted_encoder(tmp_path, pieces, family, clean):
    sizes = T5 | ({"mlp": "gated_gelu", "shared_bias": False} if family == "umt5" else {})
    folder = converted(tmp_path, family, sizes, tokenizer=pieces)
    encode = encoders.text(folder, 12)
    cache = embeddings.EmbeddingCache.create(tmp_path / "cache", embeddings.Settings(family, 12))
    texts = ["put the red block", "open  the drawer"]
    assert embeddings.fill(cache, texts, encode, batch_size=4, progress=False) == 2
    tokens, mask = encoders.tokenizers.load(pieces, clean)(texts, 12)
    params = weights.load(family, folder)
    want = np.asarray(jax.jit(weights.functions(family, sizes)["encode"])(params, tokens, mask))
    for i, text in enumerate(texts):
        row = cache.lookup(text).astype(np.float32)
        np.testing.assert_allclose(row, np.where(mask[i, :, None], want[i], 0), rtol=0.02,
                                   atol=0.02)  # fmt: skip
    dirty = encode(["a &amp; b"])[1].sum(), encode(["a & b"])[1].sum()
    assert (dirty[0] == dirty[1]) == clean


def test_folders_of_other_models_are_refused(tmp_path):
    dit = converted(tmp_path, "dit", test_convert.DIT)
    for make in (encoders.video, lambda folder: encoders.text(folder, 4)):
        with pytest.raises(ValueError, match="holds weights of 'dit', not of a"):
            make(dit)
    with pytest.raises(FileNotFoundError, match="convert again with --tokenizer=FILE"):
        encoders.text(converted(tmp_path, "t5", T5), 4)


def test_every_t5_family_is_a_text_encoder():
    assert set(encoders.CLEAN) == {f for f in families.FAMILIES if "t5" in f}
