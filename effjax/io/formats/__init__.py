"""Weights in the file formats of other libraries, in and out, with their codes and scales."""
