"""Prompts, chat templates and graders."""
