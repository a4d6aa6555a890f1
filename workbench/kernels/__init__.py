"""Fused operations: their meaning (`reference`), Triton kernels for them (`fused_*`), the choice (`dispatch`)."""
