"""A teacher behind HTTP: any vLLM server, or several of one teacher. Nothing here imports vllm.

wire says what is asked and reads what is answered, budget bounds what is in flight, link talks to
one server, fleet to all of them, probe finds out what they can do, asking puts a unit to them, and
scorer is what others see.
"""

from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.capabilities import ServerFacts
from logitcask.engine.backends.server.scorer import Server, read_key

__all__ = ["Limits", "Server", "ServerFacts", "read_key"]
