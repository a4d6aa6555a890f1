"""What each kernel takes of a card, compiled ahead of time, without one; prints a CSV table.

A process of its own: where kernels are interpreted they cannot be compiled. Occupancy is the share of a
multiprocessor's 64 warps that registers, shared memory and block slots leave room for.
"""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workbench.kernels import fused_add_norm, fused_attention

TARGETS = {80: 164, 90: 228, 100: 228}
"""Compute capability -> KiB of shared memory of a multiprocessor."""
WARPS = 4
"""Of a block, as Triton has it where nothing else is asked for."""
COLUMNS = ("kernel", "shape", "target", "registers", "spilled_bytes", "shared_bytes", "occupancy")
NUMBERS = {"eps": "fp32", "scale": "fp32", "allowed": "*u8"}
"""Types of the arguments that are neither constants, float32 tensors nor sizes."""


def kernels():
    """Kernel, its name, the shape in words and constants, at the sizes of the shipped recipes."""
    for width in (64, 128, 256):
        for way in ("forward", "backward"):
            yield (
                f"add_norm {way}",
                f"d_model {width}",
                getattr(fused_add_norm, f"{way}_kernel"),
                fused_add_norm.constants(width),
            )
    for width in (16, 32, 64):
        for way in ("forward", "dest", "src"):
            kernel = getattr(fused_attention, f"{way}_kernel")
            yield f"attention {way}", f"d_head {width}", kernel, fused_attention.constants(width)


def resources(kernel, constants, target):
    """Registers of a thread, bytes spilled, and shared memory of a block."""
    signature = {name: "constexpr" if name in constants else _type(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name] == "*fp32"}
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": WARPS},
    )
    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        ptx = Path(scratch) / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        name = re.search(r"\.target (sm_\w+)", built.asm["ptx"])[1]
        tool = folder / ("ptxas-blackwell" if target >= 100 else "ptxas")
        command = [str(tool), "-v", f"--gpu-name={name}", str(ptx), "-o", f"{scratch}/out"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", told)[1], re.search(r"(\d+) bytes spill stores", told)[1]
    return int(registers), int(spilled), built.metadata.shared


def occupancy(registers, shared, kib):
    """Registers are given out by 8 a thread; a block takes 1 KiB of shared memory more than it asks for."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * WARPS)
    by_shared = kib * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // WARPS, 32) * WARPS / 64


def _type(name):
    return NUMBERS.get(name, "i32" if name.startswith("n_") or name == "mask_stride" else "*fp32")


def main():
    """Every kernel on every target."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, shape, kernel, constants in kernels():
        for target, kib in TARGETS.items():
            registers, spilled, shared = resources(kernel, constants, target)
            share = f"{occupancy(registers, shared, kib):.2f}"
            table.writerow([name, shape, f"sm_{target}", registers, spilled, shared, share])


if __name__ == "__main__":
    main()
