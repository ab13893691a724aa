"""Calibration data: text files and hub datasets, token sequences, generated text."""
