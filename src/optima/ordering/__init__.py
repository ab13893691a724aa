"""Channels in another order, for patterns n:m: the same function, with its weights where fewer that matter are lost."""
