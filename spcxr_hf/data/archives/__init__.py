"""Readers of public archives by their published layout."""
