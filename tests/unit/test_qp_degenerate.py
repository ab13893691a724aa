"""Degenerate input of the QP engine, each with a defined answer."""
