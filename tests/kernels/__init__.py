"""Tests of the CUDA kernels, on the emulator and on a GPU. A package: tests/ has files of the same names."""
