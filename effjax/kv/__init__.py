"""The key-value cache and the methods that evict from it."""
