"""Sample responses and commit them as rollout segments."""
