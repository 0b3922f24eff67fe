"""Two students that score each other's responses, in rounds."""
