"""Arrays of a segment and their encoding."""
