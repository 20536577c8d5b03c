# SPDX-License-Identifier: Apache-2.0
"""Real weights made by others: published text, likelihoods and accuracy must come out.

The expected figures were computed in numpy from round-to-nearest weights, independently of this
package; 0.002 of likelihood and 0.05 % of accuracy (5 images) are what they are known to.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real models run in torch")

import qkern  # noqa: E402
from llama2c import Llama, Tokenizer  # noqa: E402

PUBLISHED_TEXT = "8f968f515addb23238e6d21cc2c70e9284fc57fc597e84110b21bde157ccb65d"
NLL = {
    "int8": 1.2725,
    "int8-g32": 1.2724,
    "int4-g16-asym": 1.3206,
    "int4-g32-asym": 1.3651,
    "int4-g32": 1.4150,
    "int4-g64": 1.4397,
    "int4": 1.4507,
}
ACCURACY = {
    "int8": 98.31,
    "int4": 98.29,
    "int4-g128": 98.34,
    "int4-g32": 98.39,
    "int4-g32-asym": 98.40,
    "int2-g32-asym": 97.43,
}


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Llama:
    return Llama(shared_data / "llm/stories260K/stories260K.bin")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> list[list[int]]:
    """The first 20 stories of the sample: 6,405 predicted tokens."""
    tokenizer = Tokenizer(shared_data / "llm/stories260K/tok512.bin")
    text = (shared_data / "text/tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    return [tokenizer.encode(s.strip()) for s in text.split("<|endoftext|>")[:20]]


def text_hash(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()


def quantized(model: torch.nn.Module, fmt: str) -> torch.nn.Module:
    model = copy.deepcopy(model)
    report = qkern.quantize_(model, fmt, progress=False, strict=True)
    assert report.quantized_count > 0
    return model


@torch.inference_mode()
def test_llama_float32_is_the_published_one(llama: Llama, stories: list[list[int]]) -> None:
    assert text_hash(llama.greedy(201)) == PUBLISHED_TEXT
    nll, tokens = llama.mean_nll(stories)
    assert tokens == 6405
    assert abs(nll - 1.2729) < 0.0002


@torch.inference_mode()
def test_llama_int8_writes_the_published_text(llama: Llama) -> None:
    assert text_hash(quantized(llama, "int8").greedy(201)) == PUBLISHED_TEXT


@torch.inference_mode()
@pytest.mark.parametrize("fmt", NLL)
def test_llama_likelihood(llama: Llama, stories: list[list[int]], fmt: str) -> None:
    nll, _ = quantized(llama, fmt).mean_nll(stories)
    assert abs(nll - NLL[fmt]) < 0.002


@torch.inference_mode()
def test_llama_int8_activations_lose_little(llama: Llama, stories: list[list[int]]) -> None:
    """Per group they lose less than per row, and both stay near float activations."""
    loss = {f: quantized(llama, f).mean_nll(stories)[0] for f in ("int8-a8", "int8-a8g")}
    assert loss["int8-a8"] < NLL["int8"] + 0.02
    assert loss["int8-a8g"] < NLL["int8"] + 0.02


@torch.inference_mode()
def test_llama_codebooks_beat_their_uniform_grids(llama: Llama, stories: list[list[int]]) -> None:
    """A fitted table per row cannot be worse than the uniform grid per row by much more than
    noise; on this model it is far better."""
    codebook, _ = quantized(llama, "codebook4").mean_nll(stories)
    assert codebook < NLL["int4"]


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(784, 500), torch.nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def mnist(shared_data: Path) -> tuple[Mlp, torch.Tensor, torch.Tensor]:
    folder = shared_data / "mnist"
    model = Mlp()
    state = torch.load(folder / "mnist_model.state_dict", weights_only=True, map_location="cpu")
    model.load_state_dict(state)
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 784).float()
    return model.eval(), images, torch.frombuffer(bytearray(labels), dtype=torch.uint8)


@torch.inference_mode()
@pytest.mark.parametrize("fmt", [None, *ACCURACY])
def test_mnist_accuracy(mnist: tuple[Mlp, torch.Tensor, torch.Tensor], fmt: str | None) -> None:
    model, images, labels = mnist
    if fmt:
        model = quantized(model, fmt)
    accuracy = 100 * (model(images).argmax(1) == labels).double().mean().item()
    assert abs(accuracy - (ACCURACY[fmt] if fmt else 98.31)) <= 0.05 + 1e-9
