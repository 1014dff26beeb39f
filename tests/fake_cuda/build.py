"""Compiles stubs of CUDA's runtime and driver, with which torch.cuda starts on a machine without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

_HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h")
_SOURCES = Path(__file__).parent / "stub"


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """What the stubs are compiled with.

    Attributes:
        compiler: path of a C compiler.
        headers: directories of ``cuda_runtime_api.h``, from the wheel of torch's CUDA version, and of what it includes,
            which comes with Triton.
    """

    compiler: str
    headers: tuple[Path, ...]


def find_toolchain() -> Toolchain | str:
    """What is there to compile with, or the reason why the stubs cannot be used here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.__version__ < torch.torch_version.TorchVersion("2.12"):
        return f"fake tensors of torch {torch.__version__} start a context of CUDA, for which the stubs have no kernels"
    if torch.cuda.is_available():
        return "this machine has a GPU; tests/gpu runs on it"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang) to compile the stubs of CUDA with"
    packages = Path(sysconfig.get_path("purelib"))
    headers = [_newest(packages, header) for header in _HEADERS]
    if None in headers:
        return f"{_HEADERS[headers.index(None)]} is not installed; it comes with torch's wheels for CUDA"
    return Toolchain(compiler=compiler, headers=tuple(header for header in headers if header is not None))


def _newest(packages: Path, header: str) -> Path | None:
    """The directory in which a header is to be looked for."""
    found = sorted(packages.glob(f"nvidia/*/include/{header}")) or sorted(packages.glob(f"triton/**/include/{header}"))
    return found[-1].parents[header.count("/")] if found else None


def compile_stubs(toolchain: Toolchain, directory: Path) -> list[Path]:
    """Compile the shared libraries into a directory, in the order in which they must be preloaded.

    Raises:
        subprocess.CalledProcessError: if they do not compile.
    """
    libraries = []
    for source, library, options in (
        ("runtime.c", "libcudart_stub.so", [f"-I{each}" for each in toolchain.headers]),
        ("driver.c", "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"]),
    ):
        libraries.append(directory / library)
        command = [toolchain.compiler, "-shared", "-fPIC", "-w", *options, "-o", libraries[-1], _SOURCES / source]
        subprocess.run(command, check=True)
    return libraries
