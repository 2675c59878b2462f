"""Anatomy of timm's and transformers' models: what their parts are called and where they stand."""
