"""What every row solver must do: a test class that each solver's tests inherit."""
