"""A machine for PTX: runs on the CPU what nvcc emits for csrc/cuda, and checks what a GPU does not.

parse.py reads the text and cuts it into blocks, translate.py makes a Python function of each block,
arithmetic.py is what the opcodes compute, memory.py the address spaces and their checks, machine.py
threads, barriers and launches. runtime.cpp stands in for the CUDA runtime, so that nvcc's own host
code launches on this machine; library.py builds and loads it.
"""
