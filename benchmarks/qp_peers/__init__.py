"""Other methods for the same rows, each as good as it can fairly be made."""
