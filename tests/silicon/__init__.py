"""Kernels that run on Hopper and in the emulator, and the record of what an H200 computed."""
