"""Chooses the kernel of dense attention ``softmax(q k) v``, by name or by platform.

  xla      two matmuls and a softmax, the logits in memory; on every platform
  cudnn    flash attention of cuDNN, on GPUs, in 16 bits
  splash   flash attention of JAX's own Pallas kernel, on TPUs
  auto     by platform and shape, see `choose`; xla if nothing faster is known

The choice by platform is made when a program is lowered, not when it is traced, so a program
compiled for an absent chip gets that chip's kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from wamjax.named import find

KERNELS = ("auto", "xla", "cudnn", "splash")
RESULT = "attended"  # name under which rematerialisation policies save the attention output
LANES = 128  # of a TPU; blocks of splash are multiples of it
# Number of keys from which splash pays off: at 326 tokens it gains one point of utilisation and
# costs compile time; at 1,764 it is about seven times as fast as keeping the logits in memory
# (compiled for v5p).
SPLASH_KEYS = 1024
# Block lengths: the largest fits the 16 MiB of VMEM next to a fused backward pass with heads of
# width 128 on v5p. Lengths are padded to a multiple of their block.
BLOCKS = (768, 512, 384, 256, 128)

Dense = Callable[..., Array]
Keys = Bool[np.ndarray, " s"] | None  # which keys exist, known at trace time


def attend(
    kernel: str,
    q: Float[Array, "b n l k"],
    k: Float[Array, "b n s k"],
    v: Float[Array, "b n s k"],
    keys: Keys = None,
    *,
    xla: Dense,
) -> Float[Array, "b n l k"]:
    """Computes unmasked attention with a kernel.

    Args:
      kernel: one of `KERNELS`, or a custom MODULE:FUNCTION, called with (q, k, v, keys).
      keys: which keys exist; all by default.
      xla: the function to use without a special kernel, called with (q, k, v, keys).
    """
    functions = {"xla": xla, "splash": splash, "cudnn": cudnn}
    if kernel in functions:
        return functions[kernel](q, k, v, keys)
    if kernel != "auto":
        return find(kernel, {}, "config.model.attention")(q, k, v, keys)
    with_keys = {name: functools.partial(function, keys=keys)
                 for name, function in {"default": xla, **choose(q, k)}.items()}  # fmt: skip
    if len(with_keys) == 1:
        return xla(q, k, v, keys)
    return jax.lax.platform_dependent(q, k, v, **with_keys)


def choose(q: Float[Array, "b n l k"], k: Float[Array, "b n s k"]) -> dict[str, Dense]:
    """Returns platform -> the kernel that is faster there than XLA's at these shapes, if there is
    one."""
    half, dim = q.dtype.itemsize == 2, q.shape[-1]
    out = {}
    on_gpu = jax.default_backend() == "gpu"  # JAX looks for cuDNN at trace time
    if on_gpu and half and dim % 8 == 0 and dim <= 128 and min(q.shape[2], k.shape[2]) > 1:
        out["cuda"] = cudnn
    if dim % 64 == 0 and k.shape[2] >= SPLASH_KEYS and q.shape[2] >= LANES:
        out["tpu"] = splash
    return out


def cudnn(q: Array, k: Array, v: Array, keys: Keys = None) -> Array:
    """Computes attention with cuDNN's flash kernel.

    Raises:
      ValueError: the arrays are not in 16 bits, which cuDNN requires.
    """
    if q.dtype.itemsize != 2:
        raise ValueError(f"model.attention='cudnn' computes in bfloat16 or float16, not {q.dtype}: "
                         "set precision.compute=bfloat16, or model.attention=auto")  # fmt: skip
    heads_last = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mask = None if keys is None else jnp.asarray(keys)[None, None, None]
    y = jax.nn.dot_product_attention(*heads_last, mask=mask, implementation="cudnn")
    return checkpoint_name(jnp.swapaxes(y, 1, 2), RESULT)


def splash(q: Array, k: Array, v: Array, keys: Keys = None, interpret: bool | None = None) -> Array:
    """Computes attention with JAX's Pallas kernel for TPUs; elsewhere in its interpreter, for
    tests.

    Tokens are padded to whole blocks; padded keys belong to another segment, so no query sees them.
    """
    if interpret is None:
        run = functools.partial(_splash, keys=keys, interpret=False)
        slow = functools.partial(_splash, keys=keys, interpret=True)
        return _over_mesh(lambda *x: jax.lax.platform_dependent(*x, default=slow, tpu=run))(q, k, v)
    return _over_mesh(functools.partial(_splash, keys=keys, interpret=interpret))(q, k, v)


def _splash(q: Array, k: Array, v: Array, keys: Keys, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, columns = q.shape[2], k.shape[2]
    block_q, block_k = _block(rows), _block(columns)
    q = _padded(q * q.shape[-1] ** -0.5, block_q)
    k, v = _padded(k, block_k), _padded(v, block_k)
    sizes = kernels.BlockSizes(
        block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q,
        block_kv_dkv=block_k, block_kv_dkv_compute=block_k, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * q.shape[1])
    kernel = kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        residual_checkpoint_name=RESULT,
    )  # fmt: skip
    segments = None
    exist = np.ones(columns, bool) if keys is None else keys
    exist = np.pad(exist, (0, k.shape[2] - columns))
    if not exist.all():
        segments = kernels.SegmentIds(
            q=jnp.zeros(q.shape[2], jnp.int32), kv=jnp.asarray(~exist, jnp.int32)
        )
    y = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return y[:, :, :rows].astype(v.dtype)


def _block(length: int) -> int:
    """Returns the block that needs the least padding; the larger one if there is a tie."""
    return min(BLOCKS, key=lambda size: (-(-length // size) * size, -size))


def _padded(x: Array, block: int) -> Array:
    padding = -x.shape[2] % block
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x


def _over_mesh(function: Dense) -> Dense:
    """Makes each device compute its own examples and heads, since XLA does not partition a kernel.

    Dimensions that do not divide over the devices, such as the single example used to trace shapes,
    are computed by every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: size for name, size in mesh.shape.items()
             if size > 1 and name not in mesh.manual_axes}  # fmt: skip
    if not sizes:
        return function

    def spread(q: Array, k: Array, v: Array) -> Array:
        batch = tuple(name for name in ("data", "fsdp") if name in sizes)
        if q.shape[0] % math.prod(sizes[name] for name in batch):
            batch = ()
        heads = "tensor" if q.shape[1] % sizes.get("tensor", q.shape[1] + 1) == 0 else None
        spec = PartitionSpec(batch or None, heads)
        return jax.shard_map(
            function, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )(q, k, v)

    return spread
