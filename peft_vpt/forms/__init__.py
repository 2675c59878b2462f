"""Forms: how prompts meet activations. The only code that attaches to modules."""
