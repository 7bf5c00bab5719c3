"""One file a published system: its central claim, measured here beside its baseline."""
