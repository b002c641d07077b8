"""The one exception that a script turns into a single line on the screen."""


class InputError(ValueError):
    """What the user gave cannot be used. The message says what is wrong, where, and what to do."""
