"""The one exception that a user is meant to read."""


class Refusal(Exception):
    """One clear sentence: what is wrong, where, and what to do about it.

    The command line prints it on standard error and exits with status 1; a library caller catches it.
    """
