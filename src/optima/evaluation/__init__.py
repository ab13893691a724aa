"""What a pruned model can still do."""
