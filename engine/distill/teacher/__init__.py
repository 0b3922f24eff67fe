"""The teacher of a loop: fixed, or a refresh of the student for each round."""
