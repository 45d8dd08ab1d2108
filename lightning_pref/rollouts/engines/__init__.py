"""Engines that sample: one file each."""
