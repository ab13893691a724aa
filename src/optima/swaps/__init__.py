"""Swaps of a kept and a pruned weight of a row: an optional improvement of any mask."""
