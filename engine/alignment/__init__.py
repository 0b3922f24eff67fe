"""Two tokenizations of one text: the bytes of each id, and the spans where both have a boundary."""
