"""Denoisers as the algorithms see them, and what a traced call says about their structure."""
