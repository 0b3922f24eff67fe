"""Ray as a supplier of processes: actors that do the units of a store's jobs."""
