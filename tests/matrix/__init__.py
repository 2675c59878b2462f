"""The support matrix: every architecture of timm and transformers, prompted or refused."""
