# SPDX-License-Identifier: Apache-2.0
"""Where the parts lie that C and C++ programs compile and link with."""

from __future__ import annotations

from pathlib import Path

from qkern import _core

LIBRARY = "libqkern.so.1"


def get_include() -> str:
    """The folder to search for `#include <qkern/qkern.h>`."""
    return _installed("include", "qkern/qkern.h")


def get_library_dir() -> str:
    """The folder of the shared library libqkern.so.1."""
    return _installed("lib", LIBRARY)


def get_cmake_dir() -> str:
    """The folder of qkernConfig.cmake: `qkern_DIR` for find_package(qkern CONFIG)."""
    return _installed("lib/cmake/qkern", "qkernConfig.cmake")


def get_pkgconfig_dir() -> str:
    """The folder of qkern.pc, for PKG_CONFIG_PATH."""
    return _installed("lib/pkgconfig", "qkern.pc")


def cflags() -> str:
    return f"-I{get_include()}"


def libs() -> str:
    """With the library's folder as run path: a wheel installs nothing where loaders search."""
    folder = get_library_dir()
    return f"-L{folder} -l:{LIBRARY} -Wl,-rpath,{folder}"


def _installed(folder: str, file: str) -> str:
    # Beside the compiled module: in an editable install the Python files lie elsewhere.
    path = Path(_core.__file__).resolve().parent / folder
    if not (path / file).is_file():
        raise FileNotFoundError(
            f"{path / file} is missing; this qkern was not installed as a whole (pip install .)."
        )
    return str(path)
