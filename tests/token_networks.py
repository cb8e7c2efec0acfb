"""Small networks of tokens, as people write them: what the big ones consist of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Attention(nn.Module):
    """Queries, keys and values of one matrix, and scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        values = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.proj(values.reshape(n, t, c))
        return out


class Block(nn.Module):
    """Attention and a network of two layers, each behind a norm and beside a stream."""

    def __init__(self, width: int, attention: nn.Module, scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.gamma = nn.Parameter(torch.rand(width) + 0.1) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        total: Tensor = x + (y if self.gamma is None else self.gamma * y)
        return total


class SmallViT(nn.Module):
    """A vision transformer for images of 8 x 8 or more, with a token for the class."""

    def __init__(self, size: int = 8, channels: int = 3, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        count = (size // 2) ** 2
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.position = nn.Parameter(torch.randn(1, count + 1, width) * 0.1)
        self.blocks = nn.Sequential(
            *(Block(width, Attention(width, 3), scale=i % 2 == 1) for i in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class WindowAttention(nn.Module):
    """Attention within windows of 2 x 2, shifted by one where ``shift`` says so, with a table of
    biases for relative positions and a mask."""

    def __init__(self, width: int, heads: int, side: int, shift: bool) -> None:
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(9, heads))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
        offsets = (places.flatten(1)[:, :, None] - places.flatten(1)[:, None, :] + 1) * 1
        self.register_buffer("index", offsets[0] * 3 + offsets[1])
        mask = torch.zeros((side // 2) ** 2, 4, 4)
        mask[-1, 0, 1:] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, (-1, -1), (1, 2))
        x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = self.qkv(x).reshape(x.shape[0], 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        assert isinstance(self.index, Tensor)
        scores = scores + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)[None]
        if self.shift:
            assert isinstance(self.mask, Tensor)
            windows = len(self.mask)
            scores = scores.view(-1, windows, self.heads, 4, 4) + self.mask[:, None][None]
            scores = scores.view(-1, self.heads, 4, 4)
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
        x = self.proj(x).view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, h, w, c)
        return torch.roll(x, (1, 1), (1, 2)) if self.shift else x


class SmallSwin(nn.Module):
    """Two blocks of windows, patches that are merged, one more block; values [N, H, W, C]."""

    def __init__(self, size: int = 8, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        side = size // 2
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.norm0 = nn.LayerNorm(width)
        self.stage1 = nn.Sequential(
            *(Block(width, WindowAttention(width, 2, side, shift)) for shift in (False, True))
        )
        self.merge_norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)
        self.stage2 = Block(2 * width, WindowAttention(2 * width, 4, side // 2, False))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.norm0(self.embed(x).permute(0, 2, 3, 1)))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.norm(self.stage2(self.merge(self.merge_norm(x))))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class SmallConvNeXt(nn.Module):
    """Depthwise convolutions, norms of channels and linear layers, on maps."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm0 = nn.Conv2d(channels, width, 2, 2), nn.LayerNorm(width)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.gamma = nn.Parameter(torch.rand(2, width) + 0.1)
        self.gammas = nn.ParameterList(torch.rand(width) + 0.1 for _ in range(2))
        self.down_norm, self.down = nn.LayerNorm(width), nn.Conv2d(width, 2 * width, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.group, self.head = nn.GroupNorm(1, 2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.embed(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for depthwise, block, gamma in zip(self.depthwise, self.blocks, self.gammas, strict=True):
            y = block(depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + y * gamma.reshape(1, -1, 1, 1)
        x = self.down(self.down_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        logits: Tensor = self.head(self.pool(self.group(x)).flatten(1))
        return logits


class SmallMixer(nn.Module):
    """Tokens mixed by a linear layer; attention between channels; two heads that are averaged."""

    def __init__(self, size: int = 8, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        count = (size // 2) ** 2
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.norm1, self.mix = nn.LayerNorm(width), nn.Linear(count, count)
        self.norm2, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.proj, self.bn = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.head1, self.head2 = nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = x + self.mix(self.norm1(x).mT).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = (scores * self.temperature).softmax(-1) @ v
        y = self.proj(y.permute(0, 3, 1, 2).reshape(n, t, c))
        x = x + self.bn(y.flatten(0, 1)).reshape_as(y)
        x = x.mean(1)
        logits: Tensor = (self.head1(x) + self.head2(x)) / 2
        return logits


class Standardized(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-3)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=self.padding)


class SmallBranches(nn.Module):
    """Branches beside each other, chosen by a softmax over them; a blur of mirrored borders."""

    blur: Tensor

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = Standardized(channels, width, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, k, padding=k // 2), nn.BatchNorm2d(width), nn.ReLU()
            )
            for k in (1, 3)
        )  # fmt: skip
        self.squeeze, self.choose = nn.Conv2d(width, 4, 1), nn.Conv2d(4, 2 * width, 1)
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", (line[:, None] * line).expand(width, 1, 3, 3).clone())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.stack([branch(x) for branch in self.branches], 1)
        shares = self.choose(F.relu(self.squeeze(y.sum(1).mean((2, 3), keepdim=True))))
        y = (y * shares.reshape(x.shape[0], 2, -1, 1, 1).softmax(1)).sum(1)
        y = F.pad(y, (1, 1, 1, 1), mode="reflect")
        y = F.conv2d(y, self.blur, stride=2, groups=y.shape[1])
        logits: Tensor = self.head(F.pad(y, (2, 0, 0, 1), mode="replicate").mean((2, 3)))
        return logits


class SmallShared(nn.Module):
    """PyTorch's own attention, heads that share their keys, a gate split from a linear layer."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm1 = nn.Conv2d(channels, width, 4, 2, 1), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.queries = nn.LayerNorm(width), nn.Linear(width, width)
        self.keys, self.values = nn.Linear(width, 8), nn.Linear(width, 8)
        self.norm3, self.gated = nn.LayerNorm(width), nn.Linear(width, width + 2 * 12)
        self.mix, self.head = nn.Linear(12, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y, (n, t, c) = self.norm2(x), x.shape
        queries = self.queries(y).reshape(n, t, 2, c // 2).transpose(1, 2)
        keys, values = self.keys(y).unsqueeze(1), self.values(y).unsqueeze(1)
        y = F.scaled_dot_product_attention(queries, keys, values)
        x = x + y.transpose(1, 2).reshape(n, t, c)
        gate, y, rest = self.gated(self.norm3(x)).split([12, 12, c], -1)
        x = x + self.mix(F.silu(gate) * y) + rest
        logits: Tensor = self.head(x.mean(1))
        return logits


class SmallCrossed(nn.Module):
    """PyTorch's encoder with the tokens first, of which a learned query takes what it wants."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.scaled = nn.RMSNorm(width)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.2 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm, self.query = nn.LayerNorm(width), nn.Parameter(torch.randn(2, 1, width))
        self.pool, self.head = nn.MultiheadAttention(width, 2), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        images = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.repeat(images, 1, 1), self.scaled(x)], 1) + self.places
        x = self.norm(self.encoder(x.transpose(0, 1)))
        pooled, _ = self.pool(self.query.expand(-1, images, -1), x, x)
        logits: Tensor = self.head(pooled.transpose(0, 1).flatten(1))
        return logits


NETWORKS = {
    "vit": SmallViT,
    "swin": SmallSwin,
    "convnext": SmallConvNeXt,
    "mixer": SmallMixer,
    "branches": SmallBranches,
    "shared": SmallShared,
    "crossed": SmallCrossed,
}


def network(name: str) -> nn.Module:
    """One of `NETWORKS` with random weights, whose norms and biases are as odd as real ones."""
    torch.manual_seed(0)
    model: nn.Module = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
