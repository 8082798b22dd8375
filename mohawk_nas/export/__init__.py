"""Hybrids as Hugging Face checkpoints.

Importing this package registers the hybrid model type with transformers' ``Auto*`` classes.
"""

from mohawk_nas.export.hf import HybridConfig, HybridForCausalLM, load_hybrid, save_hybrid

__all__ = ["HybridConfig", "HybridForCausalLM", "load_hybrid", "save_hybrid"]
