"""Explains a config on one web page, from the objects that it builds."""
