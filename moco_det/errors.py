"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what, where, and how to mend it.

    Command lines print it after ``error: `` and exit with status 1, without a traceback.
    """
