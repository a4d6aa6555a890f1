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

from workbench.kernels import fused_adamw, fused_add_norm, fused_attention, fused_cross_entropy
from workbench.models.kinds import build
from workbench.training.recipes import find_recipe

TARGETS = {80: 164, 90: 228, 100: 228}
"""Compute capability -> KiB of shared memory of a multiprocessor."""
WARPS = 4
"""Of a block, as Triton has it where nothing else is asked for."""
COLUMNS = ("kernel", "shape", "target", "registers", "spilled_bytes", "shared_bytes", "occupancy")
TYPES = {"eps": "fp32", "scale": "fp32", "allowed": "*u8", "mask_stride": "i32", "answer": "*i64"}
"""Types of the arguments that are neither constants, float32 tensors nor sizes."""
STRIDES = {"member_stride": "i64", "in_stride": "i32"}
TENSORS = ("weights", "gradients", "means", "squares", "slows", "steps", "rates")


def kernels():
    """Kernel, its name, the shape in words, constants and types, at the sizes of the shipped recipes."""
    for width in (64, 128, 256):
        for way in ("forward", "backward"):
            kernel = getattr(fused_add_norm, f"{way}_kernel")
            yield f"add_norm {way}", f"d_model {width}", kernel, fused_add_norm.constants(width), TYPES
    for width in (16, 32, 64):
        for way in ("forward", "dest", "src"):
            kernel = getattr(fused_attention, f"{way}_kernel")
            yield f"attention {way}", f"d_head {width}", kernel, fused_attention.constants(width), TYPES
    for width in (64, 128, 256):
        for loss in ("fp32", "fp64"):
            types = {**TYPES, **dict.fromkeys(("lse", "chosen", "d_loss"), f"*{loss}"), **STRIDES}
            for way in ("forward", "rows", "matrix"):
                kernel = getattr(fused_cross_entropy, f"{way}_kernel")
                # A stride of 1 is compiled for.
                fixed = {**fused_cross_entropy.constants(width, way), "out_stride": 1}
                yield f"cross_entropy {way}", f"d_model {width} loss {loss}", kernel, fixed, types
    for name in ("modular", "composition"):
        sizes = [parameter.numel() for parameter in build(find_recipe(name).model, generator=None).parameters()]
        fixed = fused_adamw.constants(sizes, (0.9, 0.98), 1e-8, (0.98, 2.0))
        pointers = {each: ("*fp32",) * len(sizes) for each in TENSORS}
        numbers = {"decays": ("fp32",) * len(sizes)}
        yield "adamw", f"{len(sizes)} tensors", fused_adamw.adamw_kernel, fixed, {**pointers, **numbers}


def resources(kernel, constants, types, target):
    """Registers of a thread, bytes spilled, and shared memory of a block."""
    signature = {name: "constexpr" if name in constants else _type(name, types) for name in kernel.arg_names}
    aligned = {place: [["tt.divisibility", 16]] for place in _tensors(signature.values())}
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


def _type(name, types):
    return types.get(name, "i32" if name.startswith("n_") else "*fp32")


def _tensors(signature):
    """Where float32 and float64 tensors are among arguments, or in those that are tuples."""
    for place, kind in enumerate(signature):
        for index in range(len(kind)) if isinstance(kind, tuple) else ():
            if kind[index] == "*fp32":
                yield place, index
        if kind in ("*fp32", "*fp64"):
            yield (place,)


def main():
    """Every kernel on every target."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, shape, kernel, constants, types in kernels():
        for target, kib in TARGETS.items():
            registers, spilled, shared = resources(kernel, constants, types, target)
            share = f"{occupancy(registers, shared, kib):.2f}"
            table.writerow([name, shape, f"sm_{target}", registers, spilled, shared, share])


if __name__ == "__main__":
    main()
