"""The original architectures in small, written from their descriptions: names of parameters and arithmetic
are those of the checkpoints.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tests import `published`, a module beside this one.
sys.path.insert(0, str(Path(__file__).parent))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def holder(**children: nn.Module) -> nn.Module:
    """Return a module that only names others."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Resnet(nn.Module):
    """Residual block of DDIM and of the autoencoders, which have no time embedding."""

    def __init__(self, inner: int, outer: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inner, eps=1e-6), nn.GroupNorm(32, outer, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        if embedding:
            self.temb_proj = nn.Linear(embedding, outer)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        hidden = self.conv1(swish(self.norm1(x)))
        if embedding is not None:
            hidden = hidden + self.temb_proj(swish(embedding))[:, :, None, None]
        hidden = self.conv2(swish(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over the pixels, projections as 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(query.transpose(1, 2) @ key * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((value @ weights.transpose(1, 2)).reshape(x.shape))


def halved(layer: nn.Module, x: Tensor) -> Tensor:
    """A stride-2 convolution padded on the far sides."""
    return layer.conv(F.pad(x, (0, 1, 0, 1)))


def doubled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Ddim(nn.Module):
    """The UNet of DDPM and DDIM: `down` and `up` hold a level of resolution each."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        size: int,
    ) -> None:
        super().__init__()
        self.width, widths = ch, [ch * factor for factor in ch_mult]
        self.temb = holder(dense=nn.ModuleList([nn.Linear(ch, ch * 4), nn.Linear(ch * 4, ch * 4)]))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.up, skips, last = nn.ModuleList(), nn.ModuleList(), [ch], ch
        for level, width in enumerate(widths):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(Resnet(last, width, ch * 4))
                last = width
                skips.append(width)
                if size // 2**level in attn_resolutions:
                    attentions.append(Attention(width))
            stage = holder(block=blocks, attn=attentions)
            if level < len(widths) - 1:
                stage.downsample = holder(conv=nn.Conv2d(width, width, 3, stride=2))
                skips.append(width)
            self.down.append(stage)
        self.mid = holder(
            block_1=Resnet(last, last, ch * 4), attn_1=Attention(last), block_2=Resnet(last, last, ch * 4)
        )
        stages = []
        for level, width in reversed(list(enumerate(widths))):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(Resnet(last + skips.pop(), width, ch * 4))
                last = width
                if size // 2**level in attn_resolutions:
                    attentions.append(Attention(width))
            stage = holder(block=blocks, attn=attentions)
            if level:
                stage.upsample = holder(conv=nn.Conv2d(width, width, 3, padding=1))
            stages.append(stage)
        self.up.extend(reversed(stages))
        self.norm_out, self.conv_out = nn.GroupNorm(32, last, eps=1e-6), nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        phases = t[:, None].float() * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        embedding = torch.cat([phases.sin(), phases.cos()], dim=1)
        embedding = self.temb.dense[1](swish(self.temb.dense[0](embedding)))
        hidden = self.conv_in(x)
        skips = [hidden]
        for stage in self.down:
            for index, block in enumerate(stage.block):
                hidden = block(hidden, embedding)
                hidden = stage.attn[index](hidden) if len(stage.attn) else hidden
                skips.append(hidden)
            if hasattr(stage, "downsample"):
                hidden = halved(stage.downsample, hidden)
                skips.append(hidden)
        hidden = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hidden, embedding)), embedding)
        for stage in reversed(self.up):
            for index, block in enumerate(stage.block):
                hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding)
                hidden = stage.attn[index](hidden) if len(stage.attn) else hidden
            if hasattr(stage, "upsample"):
                hidden = doubled(stage.upsample, hidden)
        return self.conv_out(swish(self.norm_out(hidden)))


class ResBlock(nn.Module):
    """Residual block of `openaimodel`, with or without a scale beside the shift; `resample` "down" averages,
    "up" repeats pixels.
    """

    def __init__(self, inner: int, outer: int, embedding: int, *, scaled: bool, resample: str = "") -> None:
        super().__init__()
        self.scaled, self.resample = scaled, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outer * (2 if scaled else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden, x = (self.resampled(values) for values in (self.in_layers[:-1](x), x))
        hidden, shift = self.in_layers[-1](hidden), self.emb_layers(embedding)[:, :, None, None]
        if self.scaled:
            scale, shift = shift.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + shift)
        return self.skip_connection(x) + hidden

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample else x


class AttentionBlock(nn.Module):
    """Self-attention over the pixels; the rows of `qkv` are ordered by head, then by q, k, v."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm, self.qkv, self.proj_out = (
            nn.GroupNorm(32, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        batch, width, length = flat.shape
        query, key, value = (
            self.qkv(self.norm(flat))
            .reshape(batch * width // self.head, 3 * self.head, length)
            .split(self.head, dim=1)
        )
        weights = torch.softmax(query.transpose(1, 2) @ key * self.head**-0.5, dim=2)
        return x + self.proj_out((value @ weights.transpose(1, 2)).reshape(batch, width, length)).reshape(
            x.shape
        )


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(inputs, width, bias=False) for inputs in (width, context, context)
        )
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=3)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width, heads), CrossAttention(width, context, heads)
        self.ff = holder(net=nn.Sequential(Gated(width), nn.Dropout(0.0), nn.Linear(4 * width, width)))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        return x + self.proj_out(self.transformer_blocks[0](tokens, context).transpose(1, 2).reshape(x.shape))


class Openai(nn.Module):
    """The UNet of latent diffusion: flat lists of blocks, a level's resampling among them."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        ch, widths = (
            params["model_channels"],
            [params["model_channels"] * factor for factor in params["channel_mult"]],
        )
        self.width, scaled = ch, params.get("use_scale_shift_norm", False)

        def attention(width: int) -> nn.Module:
            head = params.get("num_head_channels", -1)
            heads = params["num_heads"] if head == -1 else width // head
            if params.get("use_spatial_transformer"):
                return SpatialTransformer(width, params["context_dim"], heads)
            return AttentionBlock(width, width // heads)

        def block(inner: int, outer: int, level: int) -> list[nn.Module]:
            parts: list[nn.Module] = [ResBlock(inner, outer, ch * 4, scaled=scaled)]
            return [*parts, attention(outer)] if 2**level in params["attention_resolutions"] else parts

        self.time_embed = nn.Sequential(nn.Linear(ch, ch * 4), nn.SiLU(), nn.Linear(ch * 4, ch * 4))
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(params["in_channels"], ch, 3, padding=1))])
        skips, last = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(params["num_res_blocks"]):
                self.input_blocks.append(nn.Sequential(*block(last, width, level)))
                last = width
                skips.append(width)
            if level < len(widths) - 1:
                by_block = (
                    ResBlock(width, width, ch * 4, scaled=scaled, resample="down")
                    if params.get("resblock_updown")
                    else None
                )
                self.input_blocks.append(
                    nn.Sequential(by_block or holder(op=nn.Conv2d(width, width, 3, stride=2, padding=1)))
                )
                skips.append(width)
        middle = (
            ResBlock(last, last, ch * 4, scaled=scaled),
            attention(last),
            ResBlock(last, last, ch * 4, scaled=scaled),
        )
        self.middle_block = nn.Sequential(*middle)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(params["num_res_blocks"] + 1):
                parts = block(last + skips.pop(), width, level)
                last = width
                if level and index == params["num_res_blocks"]:
                    by_block = (
                        ResBlock(width, width, ch * 4, scaled=scaled, resample="up")
                        if params.get("resblock_updown")
                        else None
                    )
                    parts.append(by_block or holder(conv=nn.Conv2d(width, width, 3, padding=1)))
                self.output_blocks.append(nn.Sequential(*parts))
        self.out = nn.Sequential(
            nn.GroupNorm(32, last), nn.SiLU(), nn.Conv2d(last, params["out_channels"], 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.width // 2
        phases = t[:, None].float() * torch.exp(torch.arange(half) * -(math.log(10000) / half))
        embedding = self.time_embed(torch.cat([phases.cos(), phases.sin()], dim=1))

        def through(parts: nn.Module, hidden: Tensor) -> Tensor:
            for part in parts:
                if isinstance(part, ResBlock):
                    hidden = part(hidden, embedding)
                elif isinstance(part, SpatialTransformer):
                    hidden = part(hidden, context)
                elif hasattr(part, "op"):
                    hidden = part.op(hidden)
                else:
                    hidden = doubled(part, hidden) if hasattr(part, "conv") else part(hidden)
            return hidden

        skips = []
        for parts in self.input_blocks:
            x = through(parts, x)
            skips.append(x)
        x = through(self.middle_block, x)
        for parts in self.output_blocks:
            x = through(parts, torch.cat([x, skips.pop()], dim=1))
        return self.out(x)


class Coder(nn.Module):
    """Encoder, or decoder with the levels in reverse and one more block in each."""

    def __init__(self, sizes: dict[str, Any], *, inputs: int, outputs: int, decode: bool) -> None:
        super().__init__()
        widths = [sizes["ch"] * factor for factor in sizes["ch_mult"]]
        self.decode, last = decode, widths[-1] if decode else sizes["ch"]
        self.conv_in = nn.Conv2d(inputs, last, 3, padding=1)
        stages: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))) if decode else enumerate(widths):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(sizes["num_res_blocks"] + decode):
                blocks.append(Resnet(last, width))
                last = width
                if sizes["resolution"] // 2**level in sizes["attn_resolutions"]:
                    attentions.append(Attention(width))
            stage = holder(block=blocks, attn=attentions)
            if decode and level:
                stage.upsample = holder(conv=nn.Conv2d(width, width, 3, padding=1))
            if not decode and level < len(widths) - 1:
                stage.downsample = holder(conv=nn.Conv2d(width, width, 3, stride=2))
            stages.append(stage)
        self.add_module("up" if decode else "down", nn.ModuleList(reversed(stages) if decode else stages))
        middle = widths[-1]
        self.mid = holder(
            block_1=Resnet(middle, middle), attn_1=Attention(middle), block_2=Resnet(middle, middle)
        )
        self.norm_out, self.conv_out = (
            nn.GroupNorm(32, last, eps=1e-6),
            nn.Conv2d(last, outputs, 3, padding=1),
        )

    def _middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self._middle(x) if self.decode else x
        for stage in reversed(self.up) if self.decode else self.down:
            for index, block in enumerate(stage.block):
                x = block(x)
                x = stage.attn[index](x) if len(stage.attn) else x
            if hasattr(stage, "upsample"):
                x = doubled(stage.upsample, x)
            if hasattr(stage, "downsample"):
                x = halved(stage.downsample, x)
        x = x if self.decode else self._middle(x)
        return self.conv_out(swish(self.norm_out(x)))


class FirstStage(nn.Module):
    """The autoencoder of latent diffusion, with a codebook (`n_embed`) or a Gaussian in the middle."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        sizes, width = params["ddconfig"], params["embed_dim"]
        self.moments = 1 if "n_embed" in params else 2
        channels = sizes["z_channels"]
        self.encoder = Coder(
            sizes, inputs=sizes["in_channels"], outputs=self.moments * channels, decode=False
        )
        self.decoder = Coder(sizes, inputs=channels, outputs=sizes["out_ch"], decode=True)
        self.quant_conv = nn.Conv2d(self.moments * channels, self.moments * width, 1)
        self.post_quant_conv = nn.Conv2d(width, channels, 1)
        if self.moments == 1:
            self.quantize = holder(embedding=nn.Embedding(params["n_embed"], width))

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents, before the codebook, or the moments of the Gaussian."""
        return self.quant_conv(self.encoder(x))

    def decode(self, latents: Tensor) -> Tensor:
        if self.moments == 1:
            flat = latents.permute(0, 2, 3, 1)
            nearest = torch.cdist(flat.flatten(0, 2), self.quantize.embedding.weight).argmin(dim=1)
            latents = self.quantize.embedding(nearest).reshape(flat.shape).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))


@pytest.fixture(scope="session")
def original() -> SimpleNamespace:
    """Return the reference modules by name."""
    return SimpleNamespace(Ddim=Ddim, Openai=Openai, FirstStage=FirstStage)


@pytest.fixture(scope="session")
def randomized() -> Callable[[nn.Module], nn.Module]:
    """Return a function that gives every parameter of a module a random value, norms and biases too."""

    def fill(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(torch.randn(parameter.shape) * scale + offset)
        return module.eval()

    return fill
