"""Data quality: duplicates, splits, audit."""
