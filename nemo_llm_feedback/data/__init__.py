"""Manifests, training batches and audio files."""
