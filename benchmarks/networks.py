"""Networks that are no decoders, in PyTorch, for benchmarks/remat_graphs.py."""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _Twice(nn.Module):
    """Two convolutions of 3 x 3."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(given, made, 3, padding=1), nn.Conv2d(made, made, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.second(torch.relu(self.first(x))))


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., 2015) of four levels: image [b, 3, s, s] -> [b, 2, s, s]."""

    def __init__(self, width: int = 16, levels: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList(map(_Twice, [3, *widths[:-2]], widths[:-1]))
        self.middle = _Twice(widths[-2], widths[-1])
        self.up = nn.ModuleList(_Twice(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Any) -> Any:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = functional.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, kept.pop()], 1))
        return self.last(x)


class _Bottleneck(nn.Module):
    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(given, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1),
        )
        same = given == 4 * width and stride == 1
        self.beside = nn.Identity() if same else nn.Conv2d(given, 4 * width, 1, stride=stride)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.layers(x) + self.beside(x))


class ResNet50(nn.Module):
    """ResNet-50's shapes (He et al., 2015), norms folded: image [b, 3, s, s] -> scores [b, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        given = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(count):
                blocks.append(_Bottleneck(given, width, stride if number == 0 else 1))
                given = 4 * width
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(given, 1000)

    def forward(self, x: Any) -> Any:
        x = functional.max_pool2d(torch.relu(self.stem(x)), 3, stride=2, padding=1)
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class Residual(nn.Module):
    """Residual blocks of one resolution, for training: image [b, 3, s, s] -> scores [b, 10]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Twice(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


class Transformer(nn.Module):
    """Layers of attention and feed-forward parts, for training: x [b, n, width] -> [b, n, width]."""

    def __init__(self, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(a * width, b * width) for a, b in ((1, 3), (1, 1), (1, 4), (4, 1)))
            for _ in range(depth)
        )

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        for joint, out, up, down in self.layers:
            q, k, v = (
                part.reshape(batch, length, self.heads, width // self.heads).permute(0, 2, 1, 3)
                for part in joint(x).chunk(3, -1)
            )
            scores = torch.matmul(q, k.permute(0, 1, 3, 2)) * (width // self.heads) ** -0.5
            mixed = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3)
            x = x + out(mixed.reshape(batch, length, width))
            x = x + down(torch.relu(up(x)))
        return x


def bert(layers: int) -> Any:
    """BERT-base's shapes: token ids [b, n] -> [b, n, 768]."""
    import transformers

    config = transformers.BertConfig(num_hidden_layers=layers, attn_implementation="eager")

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertModel(config, add_pooling_layer=False)

        def forward(self, ids: Any) -> Any:
            return self.model(input_ids=ids).last_hidden_state

    return Hidden()
