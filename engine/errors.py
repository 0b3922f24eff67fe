"""Every error that a caller may want to tell apart, under one root.

LogitcaskError            exit 1   the message says what is wrong, `hint` what to do
├─ ConfigError            exit 2   a key, flag or argument has a value that the rules forbid
├─ PromptError            exit 1   a file of prompts or ids holds what cannot be used
├─ ModelError             exit 1   a model folder or hub id cannot be used
├─ IdentityError          exit 1   two things that must be the same are not (tokenizer, run)
├─ ObjectiveError         exit 1   the cache cannot serve this objective, or it has no meaning
├─ GraderError            exit 1   a grader failed, or its reward is no number in [0, 1]
├─ ServerError            exit 1   a server cannot be reached, or refuses what it is asked
├─ AnswerError            exit 1   an engine answered what no model can have computed
├─ UnitError              exit 1   one unit of work cannot be done as asked; others can
├─ IncompleteError        exit 3   the store lacks units that the job needs
└─ StoreError             exit 1   a store cannot be opened or written
   └─ IntegrityError      exit 4   stored bytes are not what was committed

A message gives the value and the rule in one line; the remedy gives the way out in another.
"""


class LogitcaskError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, cause: str, *, hint: str) -> None:
        super().__init__(cause, hint)
        self.cause = cause
        """One line: the offending value and the rule that it breaks."""
        self.hint = hint
        """One line: what the reader can do about it."""

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
    """HTTP status of a refusal; 0 = no answer."""


class AnswerError(LogitcaskError, ValueError):
    pass


class UnitError(LogitcaskError, ValueError):
    pass


class IncompleteError(LogitcaskError):
    exit_code = 3


class StoreError(LogitcaskError, OSError):
    pass


class IntegrityError(StoreError):
    exit_code = 4
