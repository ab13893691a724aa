"""What one may do to a model before or after pruning: none of it is needed to prune."""
