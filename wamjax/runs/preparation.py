"""What a run makes by itself before its first step: converted weights, text embeddings, latents.

``config.prepare`` says of which published files. All of it is kept beside the data, below
``config.data.root``, and what is there is not made again. Each part appears when it is complete;
what was encoded before an interruption is kept.
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
    """Makes what is missing of all that ``config.prepare`` says.

    Raises:
      FileNotFoundError: published files are missing, too; says what to download.
      ValueError: what is there was made of something else.
    """
    asked = config.prepare
    if not asked.denoiser:
        return
    root = sources.data_root(config.data.root)
    folder = files.below(root, asked.weights, "config.prepare.weights")
    readers = {name: Reader(files.below(root, entry.pictures or entry.path))
               for name, entry in config.data.sources.items()}  # fmt: skip
    texts = [text for reader in readers.values() for text in reader.index["instructions"]]
    cache = _cache(config, root)
    untold = cache.missing(texts)
    unseen = {name: files.below(root, entry.path)
              for name, entry in config.data.sources.items() if entry.pictures}  # fmt: skip
    unseen = {name: path for name, path in unseen.items() if not _is_of(path, readers[name])}
    codec_in_step = any(part.strip().startswith("codec=")
                        for part in config.init_from.path.split(","))  # fmt: skip
    wanted = {asked.text: bool(untold), asked.codec: bool(unseen) or codec_in_step,
              asked.denoiser: True}  # fmt: skip
    wanted = [family for family, is_wanted in wanted.items() if family and is_wanted]
    if asked.stand_in:
        checkpoint = folder / "published"
        prompts = [cache.prompt(text) for text in texts]
        _write_stand_ins(config, [f for f in wanted if _is_new(f, folder)], checkpoint, prompts)
    else:
        checkpoint = files.path(asked.checkpoint) if asked.checkpoint else None
    for family in wanted:  # before anything that takes long
        downloads.require(family, checkpoint, folder)
    made = {family: downloads.converted(family, checkpoint, folder) for family in wanted}
    if untold:
        say(f"encoding {len(untold)} instructions into {cache.path}, once")
        length = cache.settings.length
        embeddings.fill(cache, untold, encoders.text(made[asked.text], length))
    for name, path in unseen.items():
        info = precompute.latent_info(config, config.data.layout, _name(asked, asked.codec))
        say(f"encoding the pictures of {readers[name].path} into {path}, once")
        precompute.precompute(readers[name], path, info, encoders.video(made[asked.codec]))


def _is_of(path: files.Path, pictures: Reader) -> bool:
    """Whether there are latents of a data set; an error if they are of other episodes."""
    if not files.is_there(path, SPEC):
        return False
    have, want = (reader.digest("actions") for reader in (Reader(path), pictures))
    if have and want and have != want:
        raise ValueError(f"{path} was made of other episodes than {pictures.path} has now: remove "
                         "it, and it is made again")  # fmt: skip
    return True


def _name(asked, family: str) -> str:
    """What caches call an encoder."""
    name = downloads.PLACES[family].name
    return f"stand-in {name}" if asked.stand_in else name


def _cache(config, root: files.Path) -> EmbeddingCache:
    asked, length = config.prepare, config.data.instruction_length
    settings = embeddings.Settings(_name(asked, asked.text), length, template=asked.template)
    return EmbeddingCache.create(files.below(root, config.data.embeddings), settings)


def _is_new(family: str, folder: files.Path) -> bool:
    return not downloads.folder_of(family, None, folder).exists()


def _write_stand_ins(config, wanted: list[str], checkpoint: files.Path, prompts) -> None:
    for family in wanted:
        if downloads.find(family, checkpoint) is None:
            say(f"writing random weights of {family} into {checkpoint}: a stand-in")
            stand_in.write(checkpoint, family, _sizes(config, family), prompts)


def _sizes(config, family: str) -> Mapping[str, Any]:
    """The sizes that a family must have to fit the model of a config."""
    if family == config.prepare.codec:
        return {"channels": config.model.codec.channels}
    if family == config.prepare.text:
        return {"width": config.model.context_width}
    flat = configs.flatten(config)
    sizes = {key: flat[key] for key in families.family(family).sizes if key in flat}
    channels = codecs.build(config.model.codec).shape(1, 32, 32)[-1]
    return sizes | {"model.codec.channels": channels}
