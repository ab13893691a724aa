"""Other methods for the same rows."""
