"""Encoders and decoders around a quantiser: one file per net, found by the registry ``NETS``."""
