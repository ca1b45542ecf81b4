"""Building and loading models."""
