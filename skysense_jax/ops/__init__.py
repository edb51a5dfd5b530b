"""Pure functions on arrays: losses, clustering, masks, the prototype bank; no parameters."""
