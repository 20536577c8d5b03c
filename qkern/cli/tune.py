# SPDX-License-Identifier: Apache-2.0
"""Finds the fastest Triton configurations for this GPU and keeps them for later runs."""

from qkern.triton_kernels.tune import add_arguments, run

__all__ = ["add_arguments", "run"]
