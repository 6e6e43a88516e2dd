"""Defines Fast-WAM and its variants."""
