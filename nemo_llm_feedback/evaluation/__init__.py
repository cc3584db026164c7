"""Transcripts, error rates, tables, model cards and reports."""
