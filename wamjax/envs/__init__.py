"""Provides worlds to act in. `tabletop` is embedded: pure JAX, no system dependency."""
