"""MOHAWK's three stages: ``matrix``, ``hidden`` and ``logits``."""
