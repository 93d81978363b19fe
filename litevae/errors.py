"""The one exception that means "the user can mend this", and what no message shows."""

import re
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a path, an image, a checkpoint, a cache.

    The message says what is wrong, where, and what to do. The jobs print it alone, without a
    traceback, and exit with code 2. Secrets in URIs are left out of it.
    """

    def __init__(self, message: str):
        super().__init__(redact(message))


def redact(value: Any) -> Any:
    """The same value without secrets: user:password@ in URIs, and key, token, signature or password parameters."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?<=://)[^/?#\s]*@", "***@", value)
    names = "key|secret|token|passw|pwd|sig|cred|auth"
    return re.sub(rf"(?i)([?&][^=&\s]*(?:{names})[^=&\s]*=)[^&\s'\"]+", r"\1***", value)
