# SPDX-License-Identifier: Apache-2.0
"""The exceptions of qkern. Every message is a sentence: what was expected, what came."""


class QkernError(Exception):
    """Base of all errors that qkern raises on its own account."""


class FormatError(QkernError, ValueError):
    """The text, the parts or the numbers of a quantized tensor break the rules of its format."""


class UnsupportedError(QkernError, NotImplementedError):
    """Sensible, but nothing here can do it."""
