"""Task adapters: the file, and what of a model goes into it and comes back."""
