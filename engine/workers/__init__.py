"""Work units that several processes share."""
