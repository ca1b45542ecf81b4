"""A file becomes one grey image."""
