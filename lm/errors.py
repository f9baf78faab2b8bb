"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """Bad input: one line that names the key or file and says what would be valid.

    Commands print it without a traceback and exit with code 2.
    """
