"""Defines Cosmos Policy, and planning with it."""
