"""What happens to batches of images: augmentation and group masking."""
