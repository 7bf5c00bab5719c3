"""Kernels op by op: bytes moved, time or the compiler's estimate, and the fraction of the limit."""
