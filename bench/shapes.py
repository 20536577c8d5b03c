# SPDX-License-Identifier: Apache-2.0
"""Named layer shapes (N outputs, K inputs) and row counts."""

SHAPES = {
    "4096": (4096, 4096),
    "llama-8b-gate": (14336, 4096),
    "llama-8b-down": (4096, 14336),
    "llama-7b-up": (11008, 4096),
    "llama-7b-down": (4096, 11008),
    "odd": (4097, 4100),
    "odd-small": (10, 172),
    "minilm-qkv": (384, 384),
    "minilm-up": (1536, 384),
    "minilm-down": (384, 1536),
}
DEFAULT_SHAPES = ("4096", "minilm-up")
ROWS = (1, 4, 16, 64)
