"""Errors that callers can distinguish, with one base class.

LogitcaskError            exit 1   base class; `cause` and `hint` make the message
├─ ConfigError            exit 2   a key, flag or argument has a value that the rules forbid
├─ PromptError            exit 1   a line of a file of prompts or ids is invalid
├─ ModelError             exit 1   a model folder or hub id cannot be used
├─ IdentityError          exit 1   two things that must be equal differ (tokenizer, run)
├─ ObjectiveError         exit 1   the stored scores cannot serve this objective
├─ GraderError            exit 1   a grader failed, or its reward is not in [0, 1]
├─ ServerError            exit 1   a server cannot be reached, or rejects a request
├─ AnswerError            exit 1   a response holds values that no model can compute
├─ UnitError              exit 1   one work unit cannot be done as requested
├─ ProcessError           exit 1   a process of a run died, and would die again
├─ IncompleteError        exit 3   the store lacks units that the command needs
└─ StoreError             exit 1   a store, a cache or a run cannot be opened or written
   └─ IntegrityError      exit 4   stored bytes differ from those that were written

`cause` names the value and the rule in one line, `hint` the solution in another.
"""


class LogitcaskError(Exception):
    """Base class of all intended errors; the command line exits with `exit_code`."""

    exit_code = 1

    def __init__(self, cause: str, *, hint: str) -> None:
        super().__init__(cause, hint)
        self.cause = cause
        """One line: the offending value and the rule that it breaks."""
        self.hint = hint
        """One line: how to solve it."""

    def __str__(self) -> str:
        return f"{self.cause}\n{self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default rebuild would lose the keyword.
        return _rebuild, (type(self), self.cause, self.hint)


def _rebuild(kind: type[LogitcaskError], cause: str, hint: str) -> LogitcaskError:
    return kind(cause, hint=hint)


class ConfigError(LogitcaskError, ValueError):
    exit_code = 2


class PromptError(LogitcaskError, ValueError):
    pass


class ModelError(LogitcaskError, OSError):
    pass


class IdentityError(LogitcaskError, ValueError):
    pass


class ObjectiveError(LogitcaskError, ValueError):
    pass


class GraderError(LogitcaskError, ValueError):
    pass


class ServerError(LogitcaskError, OSError):
    status = 0
    """HTTP status of a rejected request; 0 = no response."""


class AnswerError(LogitcaskError, ValueError):
    pass


class UnitError(LogitcaskError, ValueError):
    pass


class ProcessError(LogitcaskError):
    pass


class IncompleteError(LogitcaskError):
    exit_code = 3


class StoreError(LogitcaskError, OSError):
    pass


class IntegrityError(StoreError):
    exit_code = 4
