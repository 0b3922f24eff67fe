"""The report of runs and stores: one page that holds everything, and the same page live."""
