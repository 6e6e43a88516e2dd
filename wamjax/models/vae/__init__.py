"""Contains autoencoders of images and video: the published VAEs, and small ones to train."""
