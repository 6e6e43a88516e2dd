"""A config explained by its own objects, as one page."""
