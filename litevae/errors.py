"""The exception for mistakes that the user can correct, and the removal of secrets from messages."""

import re
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a path, an image, a checkpoint or a cache.

    The message says what is wrong, where, and what to do. Jobs print only the message, without a traceback, and exit
    with code 2. Secrets in URIs are removed from the message.
    """

    def __init__(self, message: str):
        super().__init__(redact(message))


def redact(value: Any) -> Any:
    """Return the same value with secrets replaced by ***.

    Secrets are user:password@ in URIs, and URI parameters such as keys, tokens, signatures and passwords. Strings in
    dicts, lists and tuples are replaced too.
    """
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?<=://)[^/?#\s]*@", "***@", value)
    names = "key|secret|token|passw|pwd|sig|cred|auth"
    return re.sub(rf"(?i)([?&][^=&\s]*(?:{names})[^=&\s]*=)[^&\s'\"]+", r"\1***", value)
