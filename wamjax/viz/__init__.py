"""Draws pictures: mask tables, batches, videos, plots; nothing here needs a display.

matplotlib and ffmpeg are imported inside the functions that use them, so that importing
`wamjax.viz` costs nothing.
"""
