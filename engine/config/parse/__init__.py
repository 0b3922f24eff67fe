"""Reading of TOML files and JSON, and spelling of unknown keys."""
