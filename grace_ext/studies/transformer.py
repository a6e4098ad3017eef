"""Defines a character-level Transformer, for the task 'charlm' and for benchmarks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Block(nn.Module):
    """Pre-norm Transformer block: attention with rotary positions (Su et al. 2021), then a feed-forward layer of four times the width."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(d, dim=2))
        seen = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, d))
        return x + self.down(gelu(self.up(self.norm2(x))))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of channels of x [.., t, c] by an angle that grows with the position t."""
    t, c = x.shape[-2:]
    angle = torch.arange(t)[:, None] * 1000.0 ** (-torch.arange(0, c, 2) / c)
    cos, sin, a, b = angle.cos(), angle.sin(), x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def transformer(letters: int, d: int, layers: int, heads: int = 4) -> nn.Module:
    """Returns a model that maps letters, int64 [b, t], to scores of the next letter, [b, t, letters]."""
    blocks = [Block(d, heads) for _ in range(layers)]
    model = nn.Sequential(nn.Embedding(letters, d), *blocks, nn.LayerNorm(d), nn.Linear(d, letters))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model
