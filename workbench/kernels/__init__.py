"""Fused operations: their meaning (`reference`), Triton kernels for them (`fused_*`), the choice (`dispatch`).

A kernel is marked `no_type_check`: what Triton compiles is its own language, and a check that wraps the function, as
the tests' does, would hide the module's names from Triton's interpreter.
"""
