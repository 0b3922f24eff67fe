"""Score rollout segments and commit score segments."""
