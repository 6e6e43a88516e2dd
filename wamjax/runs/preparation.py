"""Prepares what a run needs before its first step: converted weights, text embeddings, latents.

``config.prepare`` names the published files. Results are stored next to the data, below
``config.data.root``, and are not made again. Each part appears when it is complete; work that was
encoded before an interruption is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wamjax import config as configs
from wamjax import files
from wamjax.console import say
from wamjax.data import embeddings, precompute, sources
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.records import SPEC, Reader
from wamjax.models import codec as codecs
from wamjax.weights import downloads, encoders, families, stand_in


def ensure(config) -> None:
    """Makes every part that ``config.prepare`` calls for and that is missing.

    Raises:
      FileNotFoundError: published files are missing too; says what to download.
      ValueError: an existing part was made from something else.
    """
    options = config.prepare
    if not options.denoiser:
        return
    root = sources.data_root(config.data.root)
    folder = files.below(root, options.weights, "config.prepare.weights")
    readers = {name: Reader(files.below(root, entry.pictures or entry.path))
               for name, entry in config.data.sources.items()}  # fmt: skip
    texts = [text for reader in readers.values() for text in reader.index["instructions"]]
    cache = _cache(config, root)
    missing_texts = cache.missing(texts)
    uncached = {name: files.below(root, entry.path)
                for name, entry in config.data.sources.items() if entry.pictures}  # fmt: skip
    uncached = {name: path for name, path in uncached.items() if not _is_of(path, readers[name])}
    codec_in_step = any(part.strip().startswith("codec=")
                        for part in config.init_from.path.split(","))  # fmt: skip
    families = {options.text: bool(missing_texts), options.codec: bool(uncached) or codec_in_step,
                options.denoiser: True}  # fmt: skip
    families = [family for family, is_needed in families.items() if family and is_needed]
    if options.stand_in:
        checkpoint = folder / "published"
        prompts = [cache.prompt(text) for text in texts]
        _write_stand_ins(config, [f for f in families if _is_new(f, folder)], checkpoint, prompts)
    else:
        checkpoint = files.path(options.checkpoint) if options.checkpoint else None
    for family in families:  # fail before the slow part
        downloads.require(family, checkpoint, folder)
    converted = {family: downloads.converted(family, checkpoint, folder) for family in families}
    if missing_texts:
        say(f"encoding {len(missing_texts)} instructions into {cache.path}, once")
        length = cache.settings.length
        embeddings.fill(cache, missing_texts, encoders.text(converted[options.text], length))
    for name, path in uncached.items():
        info = precompute.latent_info(config, config.data.layout, _name(options, options.codec))
        say(f"encoding the pictures of {readers[name].path} into {path}, once")
        precompute.precompute(readers[name], path, info, encoders.video(converted[options.codec]))


def _is_of(path: files.Path, pictures: Reader) -> bool:
    """Returns whether the latents of a data set exist; raises if they belong to other episodes."""
    if not files.is_there(path, SPEC):
        return False
    actual, expected = (reader.digest("actions") for reader in (Reader(path), pictures))
    if actual and expected and actual != expected:
        raise ValueError(f"{path} was made of other episodes than {pictures.path} has now: remove "
                         "it, and it is made again")  # fmt: skip
    return True


def _name(options, family: str) -> str:
    """Returns the encoder's name in caches."""
    name = downloads.PLACES[family].name
    return f"stand-in {name}" if options.stand_in else name


def _cache(config, root: files.Path) -> EmbeddingCache:
    options, length = config.prepare, config.data.instruction_length
    settings = embeddings.Settings(_name(options, options.text), length, template=options.template)
    return EmbeddingCache.create(files.below(root, config.data.embeddings), settings)


def _is_new(family: str, folder: files.Path) -> bool:
    return not downloads.folder_of(family, None, folder).exists()


def _write_stand_ins(config, families: list[str], checkpoint: files.Path, prompts) -> None:
    for family in families:
        if downloads.find(family, checkpoint) is None:
            say(f"writing random weights of {family} into {checkpoint}: a stand-in")
            stand_in.write(checkpoint, family, _sizes(config, family), prompts)


def _sizes(config, family: str) -> Mapping[str, Any]:
    """Returns the sizes that a family needs to fit the model of a config."""
    if family == config.prepare.codec:
        return {"channels": config.model.codec.channels}
    if family == config.prepare.text:
        return {"width": config.model.context_width}
    flat = configs.flatten(config)
    sizes = {key: flat[key] for key in families.family(family).sizes if key in flat}
    channels = codecs.build(config.model.codec).shape(1, 32, 32)[-1]
    return sizes | {"model.codec.channels": channels}
