"""Mask selectors: one file a method."""
