"""Rows become prompt groups, groups become batches."""
