"""Trains anything that has a loss, on any mesh, and can stop and resume at any step."""
