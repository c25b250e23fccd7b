"""GPU kernels in Triton, one operation a file; importing one needs triton."""
