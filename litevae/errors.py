"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a path, an image, a checkpoint, a cache.

    The message says what is wrong, where, and what to do. The jobs print it alone, without a
    traceback, and exit with code 2.
    """
