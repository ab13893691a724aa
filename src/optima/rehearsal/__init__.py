"""What a run will take on this machine: its own stages on random blocks and a little text, scaled up."""
