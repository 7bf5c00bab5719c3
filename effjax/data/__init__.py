"""Corpora, samplers and curation: functions from text or examples to what a step consumes."""
