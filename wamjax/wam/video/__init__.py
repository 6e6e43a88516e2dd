"""Defines models of pictures and video: denoising in all its schemes, and autoregressive."""
