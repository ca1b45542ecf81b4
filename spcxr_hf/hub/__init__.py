"""Checkpoint folders: checks, installation, publishing, export."""
