# SPDX-License-Identifier: Apache-2.0
"""A Llama as llama2.c stores it (legacy header) with its tokenizer: the real model of the tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Tokenizer:
    """llama2.c's tokenizer.bin: byte-pair encoding by best score, with a leading space."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        at, self.pieces, self.scores = 4, [], []
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        self.index = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Token ids, beginning with BOS (1)."""
        ids = []
        for character in " " + text:
            raw = character.encode()
            ids += [self.index[raw]] if raw in self.index else [b + 3 for b in raw]
        while True:
            best = None
            for i in range(len(ids) - 1):
                merged = self.index.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = (self.scores[merged], i, merged)
            if best is None:
                return [1, *ids]
            ids[best[1] : best[1] + 2] = [best[2]]


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        kv = kv_heads * self.size
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = nn.Linear(dim, kv, bias=False), nn.Linear(dim, kv, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        steps, size = x.shape[1], self.size
        angles = torch.arange(steps)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, steps, _ = x.shape
        h = self.attention_norm(x)
        q = self.rotate(self.wq(h).view(batch, steps, self.heads, self.size))
        k = self.rotate(self.wk(h).view(batch, steps, self.kv_heads, self.size))
        v = self.wv(h).view(batch, steps, self.kv_heads, self.size)
        repeat = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.wo(y.transpose(1, 2).reshape(batch, steps, -1))
        h = self.ffn_norm(x)
        return x + self.w2(functional.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """Loads the fp32 file; `forward(ids [B, T])` gives logits [B, T, vocab]."""

    def __init__(self, path: Path):
        super().__init__()
        data = path.read_bytes()
        dim, hidden, layers, heads, kv_heads, vocab, self.context = struct.unpack_from("<7i", data)
        floats = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
        self.embedding = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        order = ["attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
        targets = [self.embedding.weight]
        for name in order:
            targets += [getattr(layer, name).weight for layer in self.layers]
        at = 0
        for target in [*targets, self.norm.weight]:
            target.data = floats[at : at + target.numel()].view_as(target).clone()
            at += target.numel()
        self.eval().requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embedding.weight.T

    def greedy(self, steps: int) -> list[int]:
        ids = [1]
        while len(ids) < steps:
            ids.append(int(self(torch.tensor([ids]))[0, -1].argmax()))
        return ids

    def mean_nll(self, sequences: list[list[int]]) -> tuple[float, int]:
        """Mean negative log-likelihood of all tokens but the first of each sequence."""
        total, count = 0.0, 0
        for ids in sequences:
            tokens = torch.tensor([ids[: self.context]])
            loss = functional.cross_entropy(self(tokens)[0, :-1], tokens[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + tokens.shape[1] - 1
        return total / count, count
