"""Fast-WAM and its variants."""
