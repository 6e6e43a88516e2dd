"""From episodes on disk to batches of windows.

* `spec`: what a data set and a window of it hold
* `images`, `episodes`, `frames`, `records`, `shards`: pictures, and episodes in ArrayRecord files
* `latents`, `precompute`, `layout`: windows that a frozen codec encoded ahead of time
* `embeddings`, `tensors`: text embeddings computed ahead of time, in safetensors files
* `arrays`, `makers`: data that is arrays of examples, not episodes
* `stand_in`: random data in the formats of the real
* `normalize`: statistics of actions and proprio, and the normalisers made of them
* `tokens`: words to ids
* `skips`: bad records that are passed over
* `windows`: every step of every episode is the start of one; padding is masked
* `transforms`: pairs (forward, inverse), the same ones in training, evaluation and serving
* `sources`: opens the data sets that a config names and checks that they agree
* `mixture`: exact counts of every source in every batch, and in every shard of it
* `pipeline`: the training iterator (grain)
* `checks`: warnings about data, and a description of a batch
* `examine`, `page`: what is likely to be a mistake in a data set, and how a person sees it
* `ingest`: what others recorded, in their formats
* `write`: what is in arrays
"""

__all__ = ["write_episodes"]


def __getattr__(name: str):
    """Not on import: it pulls what reads and writes records."""
    if name != "write_episodes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wamjax.data.write import write_episodes

    return write_episodes
