"""Pictures: mask tables, batches, videos, plots. Nothing here needs a display.

matplotlib and ffmpeg are imported inside the functions that use them, so that importing
`wamjax.viz` costs nothing.
"""
