"""Stage 1: tokenizers turn signals into grids of integers and back. Scripts: ``train``, ``encode``, ``evaluate``, ``doctor``."""

from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, Source, Split
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.nets.ladder import GridConfig
from stage1_tokenizer.objectives.base import OBJECTIVES, Objective
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, Quantizer
from stage1_tokenizer.quantizers.bsq import BSQ, BSQConfig
from stage1_tokenizer.quantizers.fsq import FSQ, FSQConfig
from stage1_tokenizer.quantizers.gumbel import Gumbel, GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQ, LFQConfig
from stage1_tokenizer.quantizers.product import Product, ProductConfig
from stage1_tokenizer.quantizers.residual import Residual, ResidualConfig
from stage1_tokenizer.quantizers.simvq import SimVQ, SimVQConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerOutput
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from stage1_tokenizer.tokenizers.vqvae2 import VQVAE2, LevelConfig, VQVAE2Config

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "OBJECTIVES",
    "QUANTIZERS",
    "SOURCES",
    "TOKENIZERS",
    "VQ",
    "VQVAE",
    "VQVAE2",
    "ArraySplit",
    "BSQConfig",
    "BundledConfig",
    "ConvConfig",
    "FSQConfig",
    "GridConfig",
    "Gumbel",
    "GumbelConfig",
    "LFQConfig",
    "LevelConfig",
    "Objective",
    "Product",
    "ProductConfig",
    "Quantized",
    "Quantizer",
    "ReconstructionConfig",
    "Residual",
    "ResidualConfig",
    "SimVQ",
    "SimVQConfig",
    "Source",
    "Split",
    "Tokenizer",
    "TokenizerOutput",
    "VQConfig",
    "VQVAE2Config",
    "VQVAEConfig",
]
