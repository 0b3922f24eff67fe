"""Mass and gradient of the top-k ids of student and teacher."""
