"""The one exception that a user's mistake raises."""


class SpftError(ValueError):
    """A mistake in the user's input, described in one line.

    The message names the key or file, what was seen, what is allowed and how to mend it. Front
    ends (the Axolotl plugin, scripts) print it without a traceback.
    """
