# SPDX-License-Identifier: Apache-2.0
"""The short way of a linear call: without torch's dispatcher, where nobody could tell.

`linear(x, packed, bias, n)` gives what torch.ops.qkern.linear gives, the same bits, or None: then
the operation is to be called. csrc/bindings/eager.cpp decides. It reads tensors through the table
that torch offers to other libraries (DLPack 1.x, torch 2.10 and later); with an older torch the
answer is always None.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from qkern import _core

linear: Callable[[Tensor, Tensor | None, Tensor | None, int], Tensor | None] = _core.eager_linear

# Dispatch keys that every thread adds to every call. More of them mean that someone watches: a
# dispatch mode, a functorch transform, a tracer. (Of autocast the other set tells, the excluded.)
_ORDINARY_KEYS = ("BackendSelect", "ADInplaceOrView")


def _key_bits() -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    for name in _ORDINARY_KEYS[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


def _set_up() -> bool:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return False
    return _core.eager_setup(
        exchange=exchange,
        tensor=Tensor,
        parameter=torch.nn.Parameter,
        grad_enabled=torch.is_grad_enabled,
        function_modes=torch._C._is_torch_function_mode_enabled,
        autocast=torch._C._is_any_autocast_enabled,
        included_keys=torch._C._dispatch_tls_local_include_set,
        ordinary_keys=_key_bits(),
        profiler=vars(profiler),
        forward_gradient=vars(forward_ad),
    )


ACTIVE = _set_up()
