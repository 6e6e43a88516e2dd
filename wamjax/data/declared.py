"""Arrays that a config declares, so that a model can be built and counted without them."""

from __future__ import annotations

from wamjax.data.arrays import ArraySpec

DTYPES = {
    "video": "uint8", "label": "int32", "instruction": "int32",
    "latents": "bfloat16", "context": "bfloat16", "pooled": "float32",
}  # fmt: skip


def arrays(data) -> ArraySpec | None:
    """The spec that ``data.declared.arrays`` states, or None.

    It is ``KEY=SHAPE[:VALUES],...``: the shape of an example as 1x32x32x4 (nothing for a scalar),
    and how many values an integer key takes: "latents=1x32x32x4,label=:1000".

    Raises:
      ValueError: it cannot be read.
    """
    shapes, sizes = {}, {}
    for part in filter(None, data.declared.arrays.split(",")):
        key, _, text = part.partition("=")
        shape, _, values = text.partition(":")
        try:
            if key not in DTYPES:
                raise ValueError(f"there is no {key!r}, only {sorted(DTYPES)}")
            shapes[key] = tuple(int(n) for n in shape.split("x") if shape)
            if values:
                sizes[key] = int(values)
        except ValueError as error:
            raise ValueError(
                f"config.data.declared.arrays: {part!r} is not KEY=SHAPE[:VALUES]: {error}"
            ) from error
    if not shapes:
        return None
    return ArraySpec(shapes, {key: DTYPES[key] for key in shapes}, sizes, 0)
