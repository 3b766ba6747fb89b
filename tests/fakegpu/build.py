"""Builds the imitated CUDA runtime and driver from the installed wheels: see README.md.

    python tests/fakegpu/build.py FOLDER

The runtime imitates; it never measures. No figure from it may appear as a GPU figure.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = Path(sysconfig.get_paths()["purelib"])
CALLERS = ("torch_cuda", "c10_cuda", "torch_python", "torch_cpu", "torch_nvshmem", "torch_cuda_linalg")
CALLED = re.compile(r"(?:_*cuda[A-Z]|cublas|nccl)\w+")
TRITON = SITE / "triton/backends/nvidia"


def build(folder: Path) -> dict[str, str]:
    """Compile both libraries into `folder`; returns the variables that a child process needs to use them."""
    runtime, driver = folder / "libfakegpu.so", folder / "libcuda.so.1"
    objects = folder / "runtime.o"
    headers = [f"-I{HERE / 'shim'}", "-idirafter", str(SITE / "nvidia/cu13/include")]
    compile_(
        ["g++", "-std=c++17", "-O1", "-fPIC", "-c", *headers, str(HERE / "runtime.cpp"), "-o", str(objects)]
    )
    stubs = folder / "stubs.c"
    stubs.write_text(runtime_stubs(called_by_torch() - defined(objects)))
    compile_(["gcc", "-O1", "-fPIC", "-c", str(stubs), "-o", str(folder / "stubs.o")])
    compile_(["g++", "-shared", str(objects), str(folder / "stubs.o"), "-o", str(runtime), "-lpthread"])

    header = f"-I{TRITON / 'include'}"
    objects = folder / "driver.o"
    compile_(["gcc", "-O1", "-fPIC", "-c", header, str(HERE / "driver.c"), "-o", str(objects)])
    names = sorted(driver_functions() - defined(objects))
    stubs.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in names))
    compile_(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(objects), str(stubs), "-o", str(driver)]
    )
    (folder / "libcuda.so").symlink_to(driver.name)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    return {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": path, "TRITON_LIBCUDA_PATH": str(folder)}


def compile_(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def symbols(library: Path, *flags: str) -> list[list[str]]:
    """The words of every line that nm prints."""
    out = subprocess.run(["nm", *flags, str(library)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in out.splitlines()]


def defined(objects: Path) -> set[str]:
    return {words[2] for words in symbols(objects) if len(words) == 3 and words[1] == "T"}


def called_by_torch() -> set[str]:
    """The functions of the CUDA runtime, cuBLAS and NCCL that PyTorch's libraries call."""
    names: set[str] = set()
    for caller in CALLERS:
        lines = symbols(SITE / f"torch/lib/lib{caller}.so", "-D", "--undefined-only")
        names |= {words[-1].partition("@")[0] for words in lines}
    return {name for name in names if CALLED.fullmatch(name)}


def runtime_stubs(names: set[str]) -> str:
    """C code: functions of the CUDA runtime print that they are missing, others succeed."""
    missing = 'int {0}() {{ fprintf(stderr, "FAKEGPU: {0} is not imitated\\n"); return 801; }}\n'
    lines = [missing.format(n) if "cuda" in n else f"int {n}() {{ return 0; }}\n" for n in sorted(names)]
    return "#include <stdio.h>\n" + "".join(lines)


def driver_functions() -> set[str]:
    """Every function that the driver's header declares or Triton's C code calls."""
    header = (TRITON / "include/cuda.h").read_text()
    names = {*re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)", header)}
    names |= {*re.findall(r"^#define\s+cu\w+\s+(?:__CUDA_API_\w+\()?(cu[A-Z]\w+_v\d)", header, re.M)}
    for source in TRITON.glob("*.c"):
        names |= {*re.findall(r"\b(cu[A-Z]\w*)\(", source.read_text())}
    return names


if __name__ == "__main__":
    print("\n".join(f"export {name}={value}" for name, value in build(Path(sys.argv[1])).items()))
