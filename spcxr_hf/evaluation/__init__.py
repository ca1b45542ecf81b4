"""Metrics, intervals, calibration, and the reports made of them."""
