"""Benchmarks: ``python -m wamjax.bench NAME``."""
