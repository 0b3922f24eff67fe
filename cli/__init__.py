"""The command line: parse, call the engine, print. It holds no numerics."""
