"""Policies as a service: what a robot's process and a policy's process say to each other.

* `wire`: messages as bytes, those of openpi (msgpack with arrays)
* `client`: `Client`, which asks a server; `chunks`: one action a control step out of chunks
* `names`: observations of others as those of a policy
* `worker`: the one thread that acts, in batches; `metrics`: what is counted
* `server`: websocket and HTTP on one port

`Client`, `ActionChunks`, `wire` and `chunks` need Python 3.9, NumPy, msgpack and websockets, and no
JAX. The rest is the extra ``serve``.
"""

__all__ = ["ActionChunks", "Client"]


def __getattr__(name: str):
    if name == "Client":
        from wamjax.serving.client import Client

        return Client
    if name == "ActionChunks":
        from wamjax.serving.broker import ActionChunks

        return ActionChunks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
