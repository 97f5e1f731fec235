"""The one exception that means "the input is bad", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input from outside: a path, a file's content, a flag's value, a mismatch between artefacts.

    The message is one line and says what is wrong, where, and what to do. The command line prints it alone, without a
    traceback, and exits with status 2. Violations of our own invariants use `assert` instead.
    """
