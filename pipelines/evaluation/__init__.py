"""How good a pipeline is: feature models, distances between sets of images, the baseline without a prior, memorisation."""
