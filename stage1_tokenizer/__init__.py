"""Stage 1: tokenizers turn signals into grids of integers and back. Scripts: ``train``, ``encode``, ``evaluate``."""

from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, Source, Split
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.objectives.base import OBJECTIVES, Objective
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, Quantizer
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerOutput
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "OBJECTIVES",
    "QUANTIZERS",
    "SOURCES",
    "TOKENIZERS",
    "VQ",
    "VQVAE",
    "ArraySplit",
    "BundledConfig",
    "ConvConfig",
    "Objective",
    "Quantized",
    "Quantizer",
    "ReconstructionConfig",
    "Source",
    "Split",
    "Tokenizer",
    "TokenizerOutput",
    "VQConfig",
    "VQVAEConfig",
]
