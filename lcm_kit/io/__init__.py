"""The doors to files: how they are written, locked and read back, and the shapes of the kit's own."""
