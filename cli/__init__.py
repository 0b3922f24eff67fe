"""What a person types. Parse, call the engine, print: no numerics here."""
