"""Holds one module per format, named after the format."""
