"""Search spaces that come with the package, as YAML; a study names one by its file's stem."""
