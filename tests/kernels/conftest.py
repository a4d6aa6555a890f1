import os

# Before any kernel is imported: Triton decides at import whether kernels are compiled or interpreted on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
