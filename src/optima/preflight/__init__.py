"""What is done before the long work: every check, then weights and text are read."""
