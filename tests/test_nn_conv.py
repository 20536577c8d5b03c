# SPDX-License-Identifier: Apache-2.0
"""qkern.nn.Conv1d and Conv2d: the same bits as qkern.linear on unfolded patches."""

from __future__ import annotations

import copy
import itertools

import pytest

torch = pytest.importorskip("torch", reason="modules are torch modules")

import qkern  # noqa: E402
from qkern import _core, nn  # noqa: E402

F = torch.nn.functional
FORMATS = ("int4-g32", "int8-a8", "codebook4", "nf4-a8g", "int4-g32-asym", "int3-g24-asym-a8")
# channels, outputs, kernel, stride, padding, dilation, groups, height, width
SHAPES = (
    (3, 40, (3, 3), 1, 1, 1, 1, 7, 9),
    (5, 33, (2, 5), (2, 1), (0, 2), (1, 2), 1, 11, 13),
    (16, 70, (1, 1), 1, 0, 1, 1, 6, 5),
    (8, 16, (1, 1), 3, 2, 1, 1, 5, 5),
    (12, 66, (3, 1), 1, "same", (2, 1), 3, 9, 4),  # groups of 22 outputs straddle panels
    (8, 64, (3, 3), 2, 1, 1, 2, 8, 8),  # groups of 32 outputs: whole panels
    (20, 20, (3, 3), 1, 1, 1, 20, 6, 6),  # depthwise
    (6, 18, (4, 2), 1, "same", 1, 6, 6, 7),  # an even kernel: one more at the end
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def float_conv(shape: tuple, **options) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    channels, outputs, kernel, stride, padding, dilation, groups, _, _ = shape
    return torch.nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, **options)


def padded(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    sides = [side for pair in reversed(conv._pads) for side in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, sides, mode)


def unfolded(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """qkern.linear on the rows of torch's unfold, group by group."""
    image = padded(conv, x)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    height, width = (
        (size - span) // stride + 1
        for size, span, stride in zip(image.shape[2:], spans, conv.stride, strict=True)
    )
    bias = None if conv.bias is None else conv.bias.detach()
    each = conv.out_channels // conv.groups
    outputs = []
    for g, part in enumerate(image.chunk(conv.groups, 1)):
        # unfold knows no half precision on every build: it only copies, so float32 is exact.
        patches = F.unfold(part.float(), conv.kernel_size, conv.dilation, 0, conv.stride)
        rows = patches.transpose(1, 2).to(x.dtype)
        own = slice(g * each, (g + 1) * each)
        outputs.append(qkern.linear(rows, conv.weight, bias)[..., own])
    return torch.cat(outputs, -1).transpose(1, 2).reshape(len(x), -1, height, width)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}k{s[2]}g{s[6]}")
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_is_linear_on_unfolded_patches(fmt: str, shape: tuple) -> None:
    conv = nn.Conv2d.from_float(float_conv(shape), fmt).requires_grad_(False)
    for batch, dtype in ((2, torch.float32), (1, torch.bfloat16)):
        x = normal(batch, shape[0], *shape[7:], dtype=dtype)
        expected = unfolded(conv, x)
        assert torch.equal(conv(x), expected)
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(conv(last), expected)
        assert torch.equal(conv(x[0]), expected[0])
        wide = F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2]  # strides of a larger image
        assert torch.equal(conv(wide), expected)


@pytest.mark.parametrize("fmt", ("int4-g32-asym", "codebook3-a8"))
def test_every_instruction_set_and_number_of_threads(fmt: str, isa: str) -> None:
    conv = nn.Conv2d.from_float(float_conv(SHAPES[4]), fmt).requires_grad_(False)
    x = normal(3, 12, 9, 4)
    with qkern.override(isa="scalar", threads=1):
        expected = copy.deepcopy(conv)(x)
    for threads in (1, 2, 5):
        with qkern.override(threads=threads):
            assert torch.equal(conv(x), expected)


def test_an_image_of_many_blocks() -> None:
    conv = nn.Conv2d.from_float(float_conv((3, 40, 3, 1, 1, 1, 1, 0, 0)), "int4-g32-a8")
    conv.requires_grad_(False)
    x = normal(2, 3, 41, 37)
    expected = unfolded(conv, x)
    for threads in (1, 3, 16):
        with qkern.override(threads=threads):
            assert torch.equal(conv(x), expected)
            assert torch.equal(conv(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
def test_other_paddings(mode: str) -> None:
    source = float_conv((4, 18, (3, 2), 1, (2, 1), 1, 2, 6, 7), padding_mode=mode)
    conv = nn.Conv2d.from_float(source, "int8-a8").requires_grad_(False)
    x = normal(2, 4, 6, 7)
    assert torch.equal(conv(x), unfolded(conv, x))
    assert torch.equal(F.pad(x, (1, 1, 2, 2), mode), padded(conv, x))


@pytest.mark.parametrize("fmt", ("int4-g32", "int4-g32-a8g", "codebook4"))
def test_a_permutation_of_the_columns(fmt: str) -> None:
    source = float_conv(SHAPES[4])
    qt = qkern.quantize(source.weight.detach().flatten(1), fmt)
    perm = torch.randperm(qt.shape[1], generator=torch.Generator().manual_seed(2)).int()
    qt = qkern.QuantizedTensor.from_parts(qt.format, qt.shape, **qt.parts(), perm=perm)
    conv = nn.Conv2d.like(source, qt).requires_grad_(False)
    x = normal(2, 12, 9, 4)
    assert torch.equal(conv(x), unfolded(conv, x))


@pytest.mark.parametrize("options", (
    {"padding": 2, "stride": 2}, {"padding": "same", "dilation": 2}, {"groups": 4, "bias": False},
    {"padding": 3, "padding_mode": "circular"},
))  # fmt: skip
def test_one_dimension(options: dict) -> None:
    torch.manual_seed(0)
    source = torch.nn.Conv1d(8, 36, 3, **options)
    conv = nn.Conv1d.from_float(source, "int4-g32-a8g").requires_grad_(False)
    assert type(conv.dequantize()) is torch.nn.Conv1d
    for length in (11, 300):
        x = normal(2, 8, length)
        image = padded(conv, x)
        span = conv.dilation[0] * 2
        steps = range(0, image.shape[2] - span, conv.stride[0])
        bias = None if conv.bias is None else conv.bias.detach()
        parts = []
        for g, part in enumerate(image.chunk(conv.groups, 1)):
            rows = torch.stack(
                [part[:, :, s : s + span + 1 : conv.dilation[0]].flatten(1) for s in steps], 1
            )
            own = slice(g * 36 // conv.groups, (g + 1) * 36 // conv.groups)
            parts.append(qkern.linear(rows, conv.weight, bias)[..., own])
        expected = torch.cat(parts, -1).transpose(1, 2)
        assert torch.equal(conv(x), expected) and torch.equal(conv(x[1]), expected[1])
        assert conv(x).shape == source(x).shape


def test_memory_format_is_torchs() -> None:
    for channels, outputs, kernel in ((4, 8, 3), (1, 8, 1), (4, 1, 1), (1, 1, 3)):
        source = torch.nn.Conv2d(channels, outputs, kernel)
        conv = nn.Conv2d.from_float(source, "int8").requires_grad_(False)
        for batch, height, width in ((2, 5, 6), (1, 3, 3), (1, 3, 9), (3, 3, 3)):
            x = normal(batch, channels, height, width)
            for image in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3),
                          x.transpose(0, 1).contiguous().transpose(0, 1)):  # fmt: skip
                theirs, ours = source(image), conv(image)
                assert ours.stride() == theirs.stride(), (image.shape, image.stride())
                assert torch.equal(ours, unfolded(conv, image))


def test_gradients_reach_input_and_bias() -> None:
    for shape in (SHAPES[1], SHAPES[4], SHAPES[7]):
        conv = nn.Conv2d.from_float(float_conv(shape), "int8-a8")
        reference = conv.dequantize()
        grads = []
        for module in (conv, reference):
            x = normal(2, shape[0], *shape[7:]).requires_grad_()
            y = module(x)
            y.backward(normal(*y.shape))
            grads.append((x.grad, module.bias.grad))
        # Two orders of at most 40 * 10 products and as many roundings.
        for ours, theirs in zip(*grads, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=400 * 2.0**-23 * theirs.abs().max())


def test_empty_and_small_images() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, format="int8").requires_grad_(False)
    assert conv(normal(0, 3, 4, 4)).shape == (0, 5, 4, 4)
    assert torch.equal(conv(normal(1, 3, 1, 1)), unfolded(conv, normal(1, 3, 1, 1)))
    deep = nn.Conv2d(3, 5, 3, padding=4, format="int8").requires_grad_(False)  # patches outside
    assert torch.equal(deep(normal(1, 3, 2, 2)), unfolded(deep, normal(1, 3, 2, 2)))


@pytest.mark.parametrize("kind, options", (
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": (1, 0), "groups": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": "same", "bias": False, "padding_mode": "reflect"}),
))  # fmt: skip
def test_config_state_dict_and_copies(kind, options: dict) -> None:
    conv = kind(4, 6, format="int4-g32-asym", dtype=torch.bfloat16, **options).requires_grad_(False)
    x = normal(2, 4, *(9,) * kind.DIMENSIONS)
    before, y = copy.deepcopy(conv.state_dict()), conv(x)
    state = conv.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[n], before[n]) for n in state)
    again = kind.from_config(conv.config())
    assert all(part.is_meta for part in again.state_dict().values())
    assert again(x.to("meta")).shape == y.shape
    again.load_state_dict(before, strict=True, assign=True)
    assert torch.equal(again(x), y) and torch.equal(copy.deepcopy(conv)(x), y)
    assert repr(again) == repr(conv)
    back = conv.dequantize()
    assert type(back) is kind.FLOAT and back.weight.dtype == torch.bfloat16
    assert torch.equal(back.weight.flatten(1), conv.weight.dequantize(torch.bfloat16))


def test_bad_input_is_answered_with_a_sentence() -> None:
    conv = nn.Conv2d(4, 6, 3, format="int8")
    x = normal(1, 4, 5, 5)
    weight = conv.weight.pack_().packed().buffer
    op = torch.ops.qkern.conv
    one, zero = (1, 1), (0, 0, 0, 0)
    for error, sentence, call in (
        (ValueError, "takes 4 channels, but x has the shape", lambda: conv(x[:, 1:])),
        (ValueError, r"takes x \[B, C, H, W\] or one without B", lambda: conv(x[0, 0])),
        (TypeError, "x must be float32, .* but it is int64", lambda: conv(x.long())),
        (ValueError, "A kernel that spans 3 positions does not fit into an input of 2",
         lambda: conv(x[:, :, :2])),
        (TypeError, "A torch.nn.Conv2d was expected, but Conv1d came",
         lambda: nn.Conv2d.from_float(torch.nn.Conv1d(1, 1, 1), "int8")),
        (ValueError, "the weight has 6 outputs, but 7 were expected",
         lambda: op(x, weight, None, 7, (3, 3), one, zero, one, 1)),
        (ValueError, "the weight has 36 columns, but 4 channels per group times a kernel of 2 x 3",
         lambda: op(x, weight, None, 6, (2, 3), one, zero, one, 1)),
        (ValueError, "6 outputs cannot be divided into 4 groups",
         lambda: op(x, weight, None, 6, (3, 3), one, zero, one, 4)),
        (ValueError, "must be at least 1",
         lambda: op(x, weight, None, 6, (3, 3), (0, 1), zero, one, 1)),
        (ValueError, r"shape \(6,\), but its shape is \(3,\)",
         lambda: op(x, weight, torch.zeros(3), 6, (3, 3), one, zero, one, 1)),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()


def test_the_core_refuses_sizes_that_make_no_sense() -> None:
    conv = nn.Conv2d(4, 6, 3, format="int8").requires_grad_(False)
    packed = conv.weight.pack_().packed().buffer
    x, y = normal(1, 4, 5, 5), torch.empty(1, 6, 3, 3)
    good = [packed.data_ptr(), packed.numel(), 0, x.data_ptr(), (1, 4, 5, 5), x.stride(), (3, 3),
            (1, 1), (0, 0), (1, 1), 1, 0, 0, y.data_ptr(), (1, 6, 3, 3), y.stride()]  # fmt: skip
    _core.conv(*good)
    assert torch.equal(y + conv.bias[:, None, None], conv(x))
    for place, value in (
        (4, (-1, 4, 5, 5)), (4, (1, 2**31, 5, 5)), (6, (0, 3)), (7, (1, 0)), (8, (-1, 0)),
        (9, (0, 1)), (10, 0), (10, 3), (2, 3), (3, 0), (13, 0), (14, (1, 6, 2**31 - 1, 2**31 - 1)),
        (14, (1, 5, 3, 3)), (1, 64),
    ):  # fmt: skip
        bad = list(good)
        bad[place] = value
        if place == 14 and value[1] == 6:
            bad[4] = (2**31 - 1, 4, 5, 5)
            bad[14] = (2**31 - 1, *value[1:])
        with pytest.raises(ValueError, match=r"\w+ .*"):
            _core.conv(*bad)


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    model = torch.nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, format="int8-a8"), torch.nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding_mode="reflect", padding=1, format="int4-g32"),
    ).requires_grad_(False)  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, size in itertools.product((2, 3), (6, 9)):
        x = normal(batch, 3, size, size + 1)
        assert torch.equal(compiled(x), model(x))
