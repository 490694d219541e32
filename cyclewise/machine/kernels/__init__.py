"""The kernels, written in Python and compiled by LLVM for the processor that they run on."""
