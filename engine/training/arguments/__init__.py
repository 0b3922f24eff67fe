"""Fields of [train.args]: their checks, the trackers, and the push to the Hub."""
