# SPDX-License-Identifier: Apache-2.0
# The native module; its functions are those of csrc/include/qkern/qkern.h (csrc/bindings/).
from typing import Any

def __getattr__(name: str) -> Any: ...
