"""One grid of codes: encoder, quantiser, decoder (van den Oord et al. 2017). VQGAN, ViT-VQGAN and RQ-VAE are its compositions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.config import Added
from intarsia.distributed import Comm
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec, TokenizerSpec
from stage1_tokenizer.nets.base import NETS, NetConfig
from stage1_tokenizer.nets.conv import CONV, ConvConfig
from stage1_tokenizer.quantizers.base import QUANTIZERS, QuantizerConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig, TokenizerOutput


class VQVAEConfig(TokenizerConfig):
    """A net around a quantiser."""

    net: NetConfig = ConvConfig()
    """Encoder and decoder."""
    quantizer: QuantizerConfig = VQConfig()
    """Latents to codes."""
    by_depth: Added[bool] = False
    """The decoder is told from how many maps it decodes, for quantisers that decode from the leading ones (residual with dropout):
    its normalised channels are scaled and shifted for each count."""
    prefix_decoders: Added[tuple[int, ...]] = ()
    """Counts of leading maps, of those that such a quantiser decodes from, that have a decoder of their own. It learns from every training
    sample, weighed by `objective.prefix_weight`, and leaves the codes as they are."""

    def model_post_init(self, context: Any) -> None:
        if list(self.prefix_decoders) != sorted(set(self.prefix_decoders)):
            raise ValueError(f"prefix_decoders: {self.prefix_decoders}; expected different counts of maps that rise")


class PrefixDecoder(nn.Module):
    """A decoder like the tokenizer's: latents (B, D, *grid) to signals (B, C, *axes)."""

    def __init__(self, config: NetConfig, signal: SignalSpec, dim: int) -> None:
        super().__init__()
        self.net = NETS.build(config, signal)
        self.net.encoder = nn.Identity()  # all that encodes
        self.from_codes = CONV[len(signal.shape)](dim, self.net.width, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.net.decode(self.from_codes(z.contiguous()))


@TOKENIZERS.register("vqvae", VQVAEConfig)
class VQVAE(Tokenizer):
    """Signal (B, C, *axes) -> features -> 1-wide convolution to D -> codes (B, *grid), and back through a 3-wide one."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        self.quantizer = QUANTIZERS.build(config.quantizer)
        self.net = NETS.build(config.net, signal)
        if not isinstance(getattr(self.net, "encoder", None), nn.Module):
            raise ValueError(f"tokenizer.net: a {config.net.type_name} has no module 'encoder'; the fingerprint is taken of it")
        if config.by_depth:
            if len(self.prefixes()) < 2:
                made = f"this {config.quantizer.type_name} quantizer decodes from all of its maps alone"
                raise ValueError(f"tokenizer.by_depth: true, but {made}; expected one with quantiser dropout")
            self.net.tell(len(self.prefixes()))
        if wrong := sorted(set(config.prefix_decoders) - set(self.prefixes()[:-1])):
            counts = ", ".join(map(str, self.prefixes()[:-1])) or "none"
            made = f"this {config.quantizer.type_name} quantizer decodes from these counts of leading maps: {counts}"
            raise ValueError(f"tokenizer.prefix_decoders: {wrong[0]}, but {made}")
        conv = CONV[len(signal.shape)]
        self.to_codes = conv(self.net.width, self.quantizer.dim, 1)
        self.from_codes = conv(self.quantizer.dim, self.net.width, 3, padding=1)
        self.prefix_decoders = nn.ModuleDict(
            {str(count): PrefixDecoder(config.net, signal, self.quantizer.dim) for count in config.prefix_decoders}
        )
        self.stride = self.net.stride
        self.halo = None if self.net.halo is None else self.net.halo + 1

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.signal, self.level_specs(), self.fingerprint, self.prefixes())

    def level_specs(self) -> tuple[LevelSpec, ...]:
        return self.quantizer.level_specs("codes", self.net.grid)

    def prefixes(self) -> tuple[int, ...]:
        return self.quantizer.prefixes()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.net.last_layer

    def code_path(self) -> dict[str, nn.Module]:
        """The modules that decide the codes of a signal; ``init`` with a frozen code path trains the rest."""
        return {"to_codes": self.to_codes, "quantizer": self.quantizer, "net.encoder": self.net.encoder}

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.code_path().items():
            found = self.quantizer.code_tensors() if module is self.quantizer else dict(module.state_dict(keep_vars=True))
            tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
        return tensors

    def latents(self, x: Tensor) -> Tensor:
        """(B, C, *axes) to z_e (B, D, *grid), in float32 or wider: a half-precision net ends here."""
        z = self.to_codes(self.net.encode(x))
        return z if z.dtype == torch.float64 else z.float()

    def _reconstruct(self, z_q: Tensor, maps: int, depth: Tensor | None = None) -> Tensor:
        """``depth`` (B,): of how many stages each sample's z_q is made, where it is not of all ``maps``; the main decoder takes it then."""
        if depth is None and str(maps) in self.prefix_decoders:
            decoded: Tensor = self.prefix_decoders[str(maps)](z_q)
            return decoded
        # quantisers give channels last, in which torch's group norm is slow on a CPU
        features = self.from_codes(z_q.contiguous())
        if not self.config.by_depth:
            return self.net.decode(features)
        kind = torch.full((len(z_q),), self.prefixes().index(maps), device=z_q.device) if depth is None else depth - 1
        return self.net.decode(features, kind)

    def forward(self, x: Tensor, cond: Cond | None = None, rng: StepRng | None = None) -> TokenizerOutput:
        if cond is not None:
            raise ValueError("cond: VQVAE has no use for a condition")
        q = self.quantizer(self.latents(x), rng)
        x_hat = self._reconstruct(q.z, len(q.codes), q.depth)
        leading = ((count, self.quantizer.decode(q.codes[:count]).detach()) for count in self.config.prefix_decoders)
        prefixes = tuple((count, self._reconstruct(z, count)) for count, z in leading)
        return TokenizerOutput(x_hat, q.codes, q.loss, q.stats, prefixes, q.likely)

    @torch.no_grad()
    def initialize(self, batches: Iterable[Tensor], rng: StepRng, comm: Comm) -> None:
        parts = [self.latents(x).movedim(1, -1).reshape(-1, self.quantizer.dim) for x in batches]
        rows = torch.cat(parts) if parts else torch.zeros(0, self.quantizer.dim, device=self.device, dtype=self.dtype)
        self.quantizer.initialize(comm.gather_rows(rows), rng)
        self.quantizer.as_on_rank_0(comm)

    @torch.no_grad()
    def reestimate(self, batches: Iterable[tuple[Tensor, StepRng]], comm: Comm) -> None:
        self.discard()
        was_training = self.training
        self.train()
        latents = [(self.latents(x), rng) for x, rng in batches]
        for number in range(self.quantizer.passes):
            for z, rng in latents:
                self.quantizer(z, rng)
            self.quantizer.reestimate(comm, number)
        self.train(was_training)

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        return self.quantizer.update(rng, comm)

    def discard(self) -> None:
        self.quantizer.discard()

    def finite(self) -> Tensor:
        return self.quantizer.finite()

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.quantizer(self.latents(x)).codes

    def _decode(self, codes: tuple[Tensor, ...], cond: Any) -> Tensor:
        return self._reconstruct(self.quantizer.decode(codes).to(self.dtype), len(codes))
