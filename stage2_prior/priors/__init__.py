"""Distributions over codes: one file per prior, found by the registry ``PRIORS``."""
