"""Provides the benchmarks of ``python -m wamjax.bench NAME``."""
