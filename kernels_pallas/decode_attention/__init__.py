"""Attention of one query a row to the slots of a cache: one file a platform, and how the TPU's kernel reads codes."""
