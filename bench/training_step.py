#!/usr/bin/env python3
"""The training step of bench.c ("A training step") in PyTorch, for comparison; runs on request alone.

    pip install torch numpy
    python3 bench/training_step.py [threads] [width] [tokens]

Four transformer blocks without embedding and head: ternary weights by absmean per row and int8 activations, both
as straight-through fake quantization in float32 (what PyTorch offers for this), AdamW. Prints seconds per step.
"""
import sys
import time

import torch
import torch.nn.functional as F

threads, width, tokens = (int(sys.argv[i]) if len(sys.argv) > i else d for i, d in ((1, 1), (2, 512), (3, 4096)))
BLOCKS, CONTEXT, HEAD = 4, 256, 64
torch.set_num_threads(threads)
torch.manual_seed(1)


def straight_through(value, rounded):
    return value + (rounded - value).detach()


class BitLinear(torch.nn.Module):
    def __init__(self, rows, cols):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(rows, cols) / cols ** 0.5)

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        alpha = self.w.detach().abs().mean(1, keepdim=True).clamp(min=1e-12)
        q = straight_through(x, torch.round(x / step) * step)
        t = straight_through(self.w, torch.round(self.w / alpha).clamp(-1, 1) * alpha)
        return F.linear(q, t)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = BitLinear(3 * width, width), BitLinear(width, width)
        self.up, self.down = BitLinear(4 * width, width), BitLinear(width, 4 * width)

    def forward(self, x):
        heads = (tokens // CONTEXT, CONTEXT, width // HEAD, HEAD)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(tokens, width))
        return x + self.down(F.relu(self.up(x)).square())


model = torch.nn.Sequential(*(Block() for _ in range(BLOCKS)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(tokens, width)
best = float("inf")
for i in range(8):
    start = time.perf_counter()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    best = min(best, time.perf_counter() - start)
    print(f"step {i + 1} of 8: best so far {best:.3f} s", end="\r", flush=True)
print(f"\n{BLOCKS} blocks, width {width}, {tokens} tokens, {threads} threads, torch {torch.__version__}: {best:.3f} s per step")
