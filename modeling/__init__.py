"""What travels to the Hub beside the weights: configuration, model and image processor, each one file.

Flat on purpose. These files import the standard library, torch, transformers and each other, and nothing else of ours,
so that they also load by `trust_remote_code=True` where the package `spcxr_hf` is absent.
"""
