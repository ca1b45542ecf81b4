"""Scripts that users start: pretraining, fine-tuning, probes and reports. Installed as `spcxr_hf.training_scripts`."""
