"""What both stages of Intarsia stand on: configuration, registries, specs, randomness, codes on disk, runs."""
