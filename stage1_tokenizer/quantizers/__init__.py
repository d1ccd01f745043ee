"""Latents to integers and back: one idea per file, found by the registry ``QUANTIZERS``."""
