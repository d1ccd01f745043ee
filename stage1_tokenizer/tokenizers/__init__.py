"""Signals to codes and back: one file per system, found by the registry ``TOKENIZERS``."""
