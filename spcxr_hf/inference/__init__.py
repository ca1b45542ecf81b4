"""Inference on image files: records and pictures."""
