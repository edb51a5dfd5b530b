"""The ground floor: what knows no model and no dataset (names, shardings, meshes, streams, files, exit codes)."""
