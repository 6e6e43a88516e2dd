"""Serves policies to robots: the server, its client and the protocol between them.

* `wire`: messages as bytes, those of openpi (msgpack with arrays)
* `client`: `Client`, which requests actions; `chunks`: turns action chunks into single actions
* `names`: maps the observation keys of other clients to those of a policy
* `worker`: the one thread that runs the policy, in batches; `metrics`: counters for Prometheus
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
