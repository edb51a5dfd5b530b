"""Trees of arrays on disk: digests of their leaves, and folders whose content is checked as it is read."""
