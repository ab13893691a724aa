"""What the benchmark scripts share: the problems they solve and the clock they are timed by."""
