"""The on-policy loop: rollout, score and update, round by round."""
