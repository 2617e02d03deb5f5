"""Benchmarks that users run: `fusewire bench kernels`, in a process of its own.

`options`, `results`, `table`, `plot` and `kernels` import no torch; what measures is loaded only to measure.
"""
