"""Turns episodes on disk into batches of windows.

* `spec`: the contents of a data set and of a window
* `images`, `episodes`, `frames`, `records`, `shards`: pictures, and episodes in ArrayRecord files
* `latents`, `precompute`, `layout`: windows that a frozen codec encoded ahead of time
* `embeddings`, `tensors`: text embeddings computed ahead of time, in safetensors files
* `arrays`, `makers`: data in the form of arrays of examples instead of episodes
* `stand_in`: random data in the formats of real data
* `normalize`: statistics of actions and proprio, and normalizers from them
* `tokens`: words to ids
* `skips`: bad records that are skipped
* `windows`: every step of every episode starts a window; padding is masked
* `transforms`: pairs (forward, inverse), shared by training, evaluation and serving
* `sources`: opens the data sets that a config names and checks that they agree
* `mixture`: exact counts of every source in every batch, and in every shard of it
* `pipeline`: the training iterator (grain)
* `checks`: warnings about data, and a description of a batch
* `examine`, `page`: finds likely mistakes in a data set and shows them on a page
* `ingest`: reads recordings in other formats
* `write`: writes arrays as a data set
"""

__all__ = ["write_episodes"]


def __getattr__(name: str):
    """Imports `write_episodes` on first use, because it loads the modules that read and write
    records."""
    if name != "write_episodes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wamjax.data.write import write_episodes

    return write_episodes
