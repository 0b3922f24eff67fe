"""A remote teacher: one or more servers of vLLM or SGLang over HTTP. Nothing here imports those.

protocol.py      request bodies and checked answers of one sequence
prompt_logprobs.py  vLLM's prompt log-probs as arrays
sglang.py        SGLang's request and its answer as arrays
budget.py        limits of requests, tokens and bytes in flight
client.py        HTTP requests to one server, and the meaning of its faults
pool.py          several servers of one teacher: choice, retries, availability
capabilities.py  identity and capabilities of a server
requests.py      the requests of one work unit
scorer.py        the scorer
"""

from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.capabilities import ServerInfo
from logitcask.engine.backends.server.scorer import ServerScorer, read_key

__all__ = ["Limits", "ServerInfo", "ServerScorer", "read_key"]
