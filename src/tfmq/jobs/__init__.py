"""Quantization as a job: its stages in order, each resumable. Nothing below this folder knows of a journal,
of helpers or of a budget of time.
"""
