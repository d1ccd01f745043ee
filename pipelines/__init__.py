"""Both stages as one object: ``TwoStagePipeline`` samples, reconstructs and scores; the parts load alone, too."""

from pipelines.saving import load_prior, load_tokenizer
from pipelines.two_stage import TwoStagePipeline

__all__ = ["TwoStagePipeline", "load_prior", "load_tokenizer"]
