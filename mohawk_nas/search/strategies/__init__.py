"""Strategies that come with the package: one file each, and the file's stem is its name."""
