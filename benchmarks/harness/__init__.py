"""What the benchmark scripts share: rows to solve, text, the machine and its clock."""
