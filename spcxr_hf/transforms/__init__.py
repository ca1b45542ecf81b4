"""Transforms of image batches: augmentation and group masking."""
