"""Mixers that come with the package: one file each, and the file's stem is its name."""

# With the repository's root on sys.path this folder could also be imported as plain `mixers`, and
# every mixer would be registered twice.
if __name__ != "mohawk_nas.mixers":
    raise ImportError(f"import mohawk_nas.mixers instead of {__name__}")
