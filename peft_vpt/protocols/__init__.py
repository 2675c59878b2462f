"""What trains beside prompts, or in their place: protocols, and what each adds to a model."""
